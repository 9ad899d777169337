"""States that trainings of several rows have in common: computed once, with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.files import file_lock
from streamline_bench.core.recipe.schema import ReplacementSpec, TrainingSpec
from streamline_bench.core.training.trainer import TrainingResult, train_replacement
from streamline_bench.modeling.loading import load_model

BLOCK = 2, 3
ROWS = [("layer", "mse"), ("swiglu_res", "mse"), ("ffn", "cosine")]


def train(
    model: Any, tokens: Any, work: Path, states: Path | None, kind: str, objective: str,
    start: int = BLOCK[0], **settings: Any,
) -> TrainingResult:  # fmt: skip
    given = {"batch_size": 4, "validation_share": 0.2, "lr": 3e-3, **settings}
    return train_replacement(
        model, start=start, n=BLOCK[1], tokens=tokens, work=work, seed=1, progress=False,
        spec=ReplacementSpec.model_validate({"kind": kind}),
        training=TrainingSpec.model_validate({"objective": objective, **given}), states=states,
        weights_sha256="of the one model",
    )  # fmt: skip


def losses(result: TrainingResult) -> list[Any]:
    return [(row["train_loss"], row["val_loss"]) for row in result.curve]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("epochs", [1, 3])
def test_the_second_row_runs_no_layer_below_the_block(
    make_tiny_model: Callable[..., Path],
    padded_tokens: Any,
    tmp_path: Path,
    epochs: int,
    streamed: bool,
) -> None:
    folder = make_tiny_model("llama", num_hidden_layers=6)
    model = load_model(folder, device="cpu", streamed=streamed)
    runs: list[int] = []
    decoder_layers(model)[1].register_forward_hook(lambda *_: runs.append(1))
    for number, (kind, objective) in enumerate(ROWS):
        row = (kind, objective)
        apart = train(model, padded_tokens, tmp_path / f"{number}", None, *row, epochs=epochs)
        runs.clear()
        work = tmp_path / f"{number}-shared"
        shared = train(model, padded_tokens, work, tmp_path / "states", *row, epochs=epochs)
        assert bool(runs) == (number == 0)
        assert shared.state.keys() == apart.state.keys()
        assert all(torch.equal(shared.state[name], apart.state[name]) for name in apart.state)
        assert losses(shared) == losses(apart)
    assert len(list((tmp_path / "states").glob("*.bin"))) == 2
    assert not list(tmp_path.glob("*-shared/activations*"))


def test_autocast_shares_the_states_of_a_model_in_bfloat16(
    teacher_model: Any, padded_tokens: Any, tmp_path: Path
) -> None:
    model = copy.deepcopy(teacher_model).bfloat16()
    runs: list[int] = []
    decoder_layers(model)[1].register_forward_hook(lambda *_: runs.append(1))
    for kind in ("swiglu_res", "layer"):
        row = (kind, "mse")
        apart = train(model, padded_tokens, tmp_path / f"{kind}", None, *row, autocast="bf16")
        runs.clear()
        work = tmp_path / f"{kind}-shared"
        shared = train(model, padded_tokens, work, tmp_path / "states", *row, autocast="bf16")
        assert bool(runs) == (kind == "swiglu_res")
        assert all(torch.equal(shared.state[name], apart.state[name]) for name in apart.state)
        assert losses(shared) == losses(apart)


@pytest.mark.parametrize("changes", [{"start": 1}, {"batch_size": 2}, {"validation_share": 0.4}])
def test_other_blocks_batches_and_held_out_sequences_have_files_of_their_own(
    teacher_model: Any, tokens: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    states = tmp_path / "states"
    train(teacher_model, tokens, tmp_path / "a", states, "linear", "mse")
    first = set(states.glob("*.bin"))
    shared = train(teacher_model, tokens, tmp_path / "b", states, "linear", "mse", **changes)
    assert len(set(states.glob("*.bin")) - first) == 2
    apart = train(teacher_model, tokens, tmp_path / "c", None, "linear", "mse", **changes)
    assert all(torch.equal(shared.state[name], apart.state[name]) for name in apart.state)


def test_what_exceeds_the_budget_makes_room_but_for_what_is_being_used(
    teacher_model: Any, tokens: Any, tmp_path: Path
) -> None:
    """24 sequences of 12 tokens of 32 numbers at two boundaries; room for them, and half more."""
    states, size = tmp_path / "states", 2 * 24 * 12 * 32 * 4
    budget = {"cache_gb": 1.5 * size / 1e9}
    row = (teacher_model, tokens, tmp_path / "work", states, "linear", "mse")
    train(*row, start=0, **budget)
    held_out, training = sorted(states.glob("*.bin"), key=lambda path: path.stat().st_size)
    small, large = held_out.stat().st_size, training.stat().st_size
    assert small + large == size
    with file_lock(training.with_suffix(".lock")):
        train(*row, start=1, **budget)
    assert training.exists() and not held_out.exists()
    train(*row, start=2, **budget)
    assert not training.exists()
    assert sum(path.stat().st_size for path in states.glob("*.bin")) == size + small


def test_a_file_that_may_not_be_as_large_is_not_made(
    teacher_model: Any, tokens: Any, tmp_path: Path
) -> None:
    row = (teacher_model, tokens, tmp_path / "a", tmp_path / "states", "linear", "mse")
    assert train(*row, cache_gb=1e-6).summary["hidden_states"] == "streamed"
    assert not (tmp_path / "states").exists()
