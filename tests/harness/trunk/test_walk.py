"""Answers of models that walk together are, bit for bit, those they give alone."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tqdm import tqdm

from streamline_bench.errors import ComparisonError, NumericsError
from streamline_bench.harness.lm import StreamlineLM
from streamline_bench.harness.trunk.assembly import Assembly, assemble
from streamline_bench.harness.trunk.request import TrunkRequest
from streamline_bench.harness.trunk.stack import read_stack, walks_of

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5},
    "gemma3_text": {"sliding_window": 16, "head_dim": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_inner": 48},
    "mixtral": {"num_local_experts": 4},
    "phi3": {
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 8.0, 24.0, 40.0],
        },
    },
}


def words(draw: random.Random, count: int) -> str:
    return " ".join(f"w{draw.randrange(96)}" for _ in range(count))


def choices(seed: int = 0) -> list[Instance]:
    draw = random.Random(seed)
    pairs = []
    for question in range(8):
        context = words(draw, 2 + 3 * question)
        pairs += [(context, " " + words(draw, 1 + (question + i) % 6)) for i in range(3)]
    pairs += [("", words(draw, 4)), pairs[0], (words(draw, 140), " " + words(draw, 5))]
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


def texts() -> list[Instance]:
    draw = random.Random(5)
    return [
        Instance("loglikelihood_rolling", {}, (words(draw, n),), 0) for n in (3, 150, 40, 300, 1)
    ]


def together(checkpoints: Mapping[str, Path], tmp_path: Path, **options: Any) -> Assembly:
    request = TrunkRequest(
        checkpoints=dict(checkpoints),
        outputs={label: tmp_path / label for label in checkpoints},
        tasks=("none",),
        **{"batch_size": 4, "device": "cpu", "dtype": "float32", **options},
    )
    stacks = {label: read_stack(folder) for label, folder in checkpoints.items()}
    (order,) = walks_of(stacks)
    return assemble(request, order, stacks, progress=False)


def alone(folder: Path, **options: Any) -> StreamlineLM:
    return StreamlineLM(
        **{"pretrained": str(folder), "batch_size": 4, "device": "cpu", "dtype": "float32"}
        | options
    )


def same_bits(first: list[Any], second: list[Any]) -> None:
    def scores(answers: list[Any]) -> torch.Tensor:
        flat = [a if isinstance(a, tuple) else (a, True) for a in answers]
        return torch.tensor(flat, dtype=torch.float64)

    assert torch.equal(scores(first), scores(second))


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_and_dropped_blocks(
    family: str,
    make_tiny_model: Callable[..., Path],
    make_variant: Callable[..., Path],
    tmp_path: Path,
) -> None:
    dense = make_tiny_model(family, num_hidden_layers=5, **FAMILIES[family])
    checkpoints = {
        "dense": dense,
        "middle": make_variant(dense, [0, 1, 4]),
        "late": make_variant(dense, [0, 1, 2, 4]),
        "last": make_variant(dense, [0, 1, 2, 3]),
    }
    party = together(checkpoints, tmp_path)
    assert set(party.models) == set(checkpoints)
    assert sum(party.shared_layers.values()) == 4 + 3 + 2  # all but 5 + 1 + 1 of 16
    answers: dict[str, list[Any]] = {}
    for label, folder in checkpoints.items():
        answers[label] = party.models[label].loglikelihood(choices(), disable_tqdm=True)
        same_bits(answers[label], alone(folder).loglikelihood(choices(), disable_tqdm=True))
    rolled = {k: party.models[k].loglikelihood_rolling(texts(), disable_tqdm=True) for k in answers}
    for label in ("dense", "middle"):
        expected = alone(checkpoints[label]).loglikelihood_rolling(texts(), disable_tqdm=True)
        same_bits(rolled[label], expected)
    assert len({tuple(each) for each in answers.values()}) == 4


def test_networks_behind_shared_layers(
    tiny_llama: Path, make_variant: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoints = {
        "dense": tiny_llama,
        "ffn": make_variant(tiny_llama, [0, 1, 4, 5], attach=(1, "ffn"), seed=1),
        "swiglu": make_variant(tiny_llama, [0, 1, 4, 5], attach=(1, "swiglu_res"), seed=2),
        "dropped": make_variant(tiny_llama, [0, 1, 4, 5]),
        "late": make_variant(tiny_llama, [0, 1, 2, 3], attach=(3, "linear"), seed=3),
    }
    party = together(checkpoints, tmp_path)
    # The one whose network comes last walks first or after the dense model; both share 4 layers.
    assert party.shared_layers == {"dense": 0, "late": 4, "ffn": 2, "swiglu": 2, "dropped": 2}
    for label, folder in checkpoints.items():
        same_bits(
            party.models[label].loglikelihood(choices(), disable_tqdm=True),
            alone(folder).loglikelihood(choices(), disable_tqdm=True),
        )


def test_every_shared_layer_runs_once_per_batch(
    tiny_llama: Path, make_variant: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoints = {
        "dense": tiny_llama,
        "early": make_variant(tiny_llama, [0, 3, 4, 5]),
        "late": make_variant(tiny_llama, [0, 1, 2, 3]),
    }
    single = alone(tiny_llama, batch_size=1)
    single.loglikelihood(choices(), disable_tqdm=True)  # Self-checks come first.
    party = together(checkpoints, tmp_path, batch_size=1)
    for model in party.models.values():
        scorer = model.scorer
        assert scorer is not None
        scorer._verified = 10**6
    tokens: dict[str, int] = {}

    def count(label: str, model: Any) -> None:
        def add(_: Any, args: Any, output: Any) -> None:
            tokens[label] = tokens.get(label, 0) + args[0].shape[0] * args[0].shape[1]

        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(
                lambda module, args, kwargs, output: add(module, [kwargs["hidden_states"]], output),
                with_kwargs=True,
            )

    count("alone", single.model)
    for label, model in party.models.items():
        count(label, model.model)
    single.loglikelihood(choices(), disable_tqdm=True)
    party.models["dense"].loglikelihood(choices(), disable_tqdm=True)
    per_layer = tokens.pop("alone") // 6
    assert sum(tokens.values()) == (6 + 3 + 0) * per_layer
    before = dict(tokens)
    for label in ("early", "late"):
        party.models[label].loglikelihood(choices(), disable_tqdm=True)
    assert tokens == before


def test_other_requests_than_those_asked_before_are_refused(
    tiny_llama: Path, make_variant: Callable[..., Path], tmp_path: Path
) -> None:
    party = together({"dense": tiny_llama, "a": make_variant(tiny_llama, [0, 1])}, tmp_path)
    party.models["dense"].loglikelihood(choices(), disable_tqdm=True)
    with pytest.raises(ComparisonError, match=r"'a' .*other loglikelihood requests.*by itself"):
        party.models["a"].loglikelihood(choices(seed=1), disable_tqdm=True)
    assert party.models["dense"].loglikelihood_rolling([], disable_tqdm=True) == []


def test_a_model_with_damaged_weights_fails_alone(
    tiny_llama: Path, make_variant: Callable[..., Path], tmp_path: Path
) -> None:
    def damage(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))

    checkpoints = {
        "dense": tiny_llama,
        "bad": make_variant(tiny_llama, range(6), edit=damage),
        "worse": make_variant(tiny_llama, [0, 1, 2], edit=damage),
        "good": make_variant(tiny_llama, [0, 1, 2]),
    }
    party = together(checkpoints, tmp_path)
    for label in ("dense", "good"):
        same_bits(
            party.models[label].loglikelihood(choices(), disable_tqdm=True),
            alone(checkpoints[label]).loglikelihood(choices(), disable_tqdm=True),
        )
    for label in ("bad", "worse"):
        with pytest.raises(NumericsError, match="is NaN"):
            party.models[label].loglikelihood(choices(), disable_tqdm=True)


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tqdm[Any]]:
    """The progress bars of walks, as they are made; ``moves`` are the places they were seen at."""
    made: list[tqdm[Any]] = []

    class Seen(tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "disable": False, "file": io.StringIO()})
            self.moves: list[int] = []
            made.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            self.moves.append(int(self.n))
            return shown

    monkeypatch.setattr("streamline_bench.harness.trunk.walk.tqdm", Seen)
    return made


def test_the_bar_moves_with_every_model(
    tiny_llama: Path,
    make_variant: Callable[..., Path],
    tmp_path: Path,
    bars: list[Any],
) -> None:
    checkpoints = {"dense": tiny_llama, "a": make_variant(tiny_llama, [0, 1, 2]),
                   "b": make_variant(tiny_llama, [0, 1])}  # fmt: skip
    party = together(checkpoints, tmp_path, batch_size=64)
    asked = len(choices())
    party.models["dense"].loglikelihood(choices(), disable_tqdm=True)
    (bar,) = bars
    steps = [after - before for before, after in pairwise(bar.moves) if after != before]
    assert bar.total == sum(steps) == 3 * asked
    # In every batch, model after model.
    assert len(steps) >= 3 and steps[::3] == steps[1::3] == steps[2::3]


def test_running_out_of_memory_halves_the_batches_of_all(
    tiny_llama: Path, make_variant: Callable[..., Path], tmp_path: Path, bars: list[Any]
) -> None:
    checkpoints = {"dense": tiny_llama, "a": make_variant(tiny_llama, [0, 1, 2])}
    party = together(checkpoints, tmp_path)
    scorer = party.models["a"].scorer
    assert scorer is not None
    real, failures = scorer.ask, []

    def limited(tensors: Any, queries: Any) -> Any:
        if tensors.ids.numel() > 200:
            failures.append(tensors.ids.numel())
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return real(tensors, queries)

    scorer.ask = limited  # type: ignore[method-assign]
    for label, folder in checkpoints.items():
        found = party.models[label].loglikelihood(choices(), disable_tqdm=True)
        expected = alone(folder).loglikelihood(choices(), disable_tqdm=True)
        assert [a for a, _ in found] == pytest.approx([a for a, _ in expected], abs=1e-4)
    assert failures
    assert bars[0].n == bars[0].total == 2 * len(choices())


def test_models_that_need_other_batches_still_get_their_own_answers(
    tiny_llama: Path, make_variant: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoints = {
        "dense": tiny_llama,
        "a": make_variant(tiny_llama, [0, 1, 2]),
        "b": make_variant(tiny_llama, [0, 1, 2, 5]),
    }
    party = together(checkpoints, tmp_path)
    lone = alone(checkpoints["a"])
    for model in (party.models["a"], lone):
        scorer = model._token_scorer()
        assert scorer is not None
        scorer._share_up_to = 0  # as if packing had changed its logits
    for label, folder in checkpoints.items():
        single = lone if label == "a" else alone(folder)
        same_bits(
            party.models[label].loglikelihood(choices(), disable_tqdm=True),
            single.loglikelihood(choices(), disable_tqdm=True),
        )
