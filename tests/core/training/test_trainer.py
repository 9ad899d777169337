"""Training a replacement, from call to result."""

from __future__ import annotations

import copy
import itertools
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.recipe.schema import ReplacementSpec, TrainingSpec
from streamline_bench.core.training.block import recomputed
from streamline_bench.core.training.trainer import train_replacement
from streamline_bench.errors import (
    CalibrationError,
    NumericsError,
    OutputError,
    RecipeError,
    SparsityError,
)

FAST: dict[str, Any] = {"batch_size": 4, "validation_share": 0.2, "lr": 3e-3}


def train(model: Any, tokens: Any, work: Path, **changes: Any) -> Any:
    settings = {
        "kind": "layer",
        "objective": "mse",
        "start": 2,
        "n": 3,
        "quirks": (),
        "at_once": None,
    }
    settings |= changes
    spec = {"kind": settings.pop("kind"), "layers": settings.pop("layers", 1)}
    place = {key: settings.pop(key) for key in ("start", "n", "quirks", "at_once")}
    return train_replacement(
        model,
        spec=ReplacementSpec.model_validate(spec),
        training=TrainingSpec.model_validate({**FAST, **settings}),
        tokens=tokens,
        work=work,
        seed=1,
        progress=False,
        **place,
    )


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        *itertools.product(
            ["layer", "ffn", "swiglu", "ffn_res", "swiglu_res", "linear"], ["mse", "lm"]
        ),
        *(("layer", "relative_mse"), ("ffn", "cosine")),
    ],
)
def test_loss_falls_for_every_kind(
    teacher_model: Any, tokens: Any, tmp_path: Path, kind: str, objective: str
) -> None:
    # The sequences held out are few and random, so what falls is the loss of those trained on.
    result = train(teacher_model, tokens, tmp_path, kind=kind, objective=objective, epochs=6)
    losses = [row["train_loss"] for row in result.curve if row["train_loss"] is not None]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(tensor.isfinite().all() for tensor in result.state.values())


@pytest.mark.parametrize("objective", ["mse", "lm"])
def test_parts_of_micro_batches_give_the_same_weights(
    teacher_model: Any, tokens: Any, tmp_path: Path, objective: str
) -> None:
    settings = {"objective": objective, "gradient_accumulation": 2, "epochs": 2}
    whole = train(teacher_model, tokens, tmp_path / "whole", **settings)
    parts = train(teacher_model, tokens, tmp_path / "parts", **settings, at_once=3)
    assert parts.summary["steps"] == whole.summary["steps"]
    assert parts.summary["tokens"] == whole.summary["tokens"]
    for name, tensor in whole.state.items():
        torch.testing.assert_close(parts.state[name], tensor, rtol=1e-4, atol=1e-5)


def test_result_describes_the_training(teacher_model: Any, tokens: Any, tmp_path: Path) -> None:
    result = train(teacher_model, tokens, tmp_path, gradient_accumulation=2, epochs=2)
    curve = result.curve
    assert [row["step"] for row in curve] == list(range(7))
    assert curve[0]["val_loss"] == result.summary["initial_loss"]
    assert curve[-1]["tokens"] == result.summary["tokens"] == 2 * 19 * 12
    validated = {row["step"]: row["val_loss"] for row in curve if row["val_loss"] is not None}
    best_step, best_loss = result.summary["best_step"], result.summary["best_loss"]
    assert best_loss == min(validated.values()) == validated[best_step]
    assert curve[-1]["lr"] == pytest.approx(3e-4)
    written = (tmp_path / "curve.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == curve
    json.dumps(result.summary, allow_nan=False)


def test_state_is_named_as_the_layers_are(teacher_model: Any, tokens: Any, tmp_path: Path) -> None:
    result = train(teacher_model, tokens, tmp_path, layers=2)
    layer = decoder_layers(teacher_model)[0].state_dict()
    assert set(result.state) == {f"{i}.{name}" for i in range(2) for name in layer}
    assert {t.dtype for t in result.state.values()} == {torch.float32}


def test_best_state_is_a_copy_and_not_the_last(
    teacher_model: Any, tokens: Any, tmp_path: Path
) -> None:
    """A rate that makes things worse: the untrained weights are the best, and are given back."""
    result = train(teacher_model, tokens, tmp_path, lr=0.3, epochs=2, warmup_ratio=0.0)
    assert result.summary["best_step"] == 0
    original = decoder_layers(teacher_model)[2].state_dict()
    for name, tensor in original.items():
        assert torch.equal(result.state[f"0.{name}"], tensor)


@pytest.mark.parametrize("objective", ["mse", "lm"])
def test_the_model_is_left_as_it_was(
    teacher_model: Any, tokens: Any, tmp_path: Path, objective: str
) -> None:
    model = teacher_model.train()
    model.model.layers[1].eval()
    model.lm_head.requires_grad_(False)
    weights = copy.deepcopy(model.state_dict())
    layers = list(decoder_layers(model))
    modes = [module.training for module in model.modules()]
    train(model, tokens, tmp_path, objective=objective)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert list(decoder_layers(model)) == layers
    assert [module.training for module in model.modules()] == modes
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"lm_head.weight"}
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("objective", ["mse", "lm"])
def test_accumulated_batches_equal_a_large_one(
    teacher_model: Any, padded_tokens: Any, tmp_path: Path, objective: str
) -> None:
    """Micro-batches of unequal numbers of tokens, and a last step that is not full."""
    states = [
        train(
            teacher_model,
            padded_tokens,
            tmp_path / f"{batch}",
            objective=objective,
            batch_size=batch,
            gradient_accumulation=steps,
            validations=1,
            # No adaptive division, which would blow rounding up where gradients are near zero.
            lr=1e-4,
        ).curve[-1]["train_loss"]
        for batch, steps in ((8, 1), (4, 2), (2, 4))
    ]
    assert states[1] == pytest.approx(states[0], rel=1e-4)
    assert states[2] == pytest.approx(states[0], rel=1e-4)


def test_accumulated_gradients_equal_those_of_a_large_batch(
    teacher_model: Any, padded_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[torch.Tensor]] = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        seen[-1].extend(p.grad.clone() for p in parameters)
        return clip(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    for batch, accumulation in ((16, 1), (4, 4)):
        seen.append([])
        work = tmp_path / str(batch)
        sizes = {"batch_size": batch, "gradient_accumulation": accumulation}
        train(teacher_model, padded_tokens, work, **sizes)
    for whole, parts in zip(*seen, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_several_epochs_store_the_states_and_one_does_not(
    teacher_model: Any, padded_tokens: Any, tmp_path: Path
) -> None:
    train(teacher_model, padded_tokens, tmp_path / "one")
    assert not list((tmp_path / "one").glob("activations*"))
    result = train(teacher_model, padded_tokens, tmp_path / "three", epochs=3)
    assert "memory-mapped" in result.summary["hidden_states"]
    stored = (tmp_path / "three" / "activations_training.bin").stat().st_size
    assert stored == 2 * 13 * 12 * 32 * 4
    streamed = train(teacher_model, padded_tokens, tmp_path / "budget", epochs=3, cache_gb=0)
    assert "exceeds training.cache_gb" in streamed.summary["hidden_states"]
    for name, tensor in result.state.items():
        torch.testing.assert_close(streamed.state[name], tensor, rtol=1e-3, atol=1e-4)


def test_stored_states_spare_the_teacher(teacher_model: Any, tokens: Any, tmp_path: Path) -> None:
    runs = []
    decoder_layers(teacher_model)[0].register_forward_hook(lambda *_: runs.append(1))
    train(teacher_model, tokens, tmp_path, epochs=4)
    # Micro-batches of 19 training and 5 validation sequences, once; and the form of an output.
    assert len(runs) == 5 + 2 + 1


def test_stored_states_of_other_tokens_are_not_reused(
    teacher_model: Any, tokens: Any, tmp_path: Path
) -> None:
    other = tokens.from_tensors(tokens.input_ids.flip(1))
    train(teacher_model, tokens, tmp_path, epochs=2)
    again = train(teacher_model, other, tmp_path, epochs=2)
    fresh = train(teacher_model, other, tmp_path / "fresh", epochs=2)
    assert all(torch.equal(again.state[name], fresh.state[name]) for name in fresh.state)


def test_bf16_autocast(teacher_model: Any, tokens: Any, tmp_path: Path) -> None:
    exact = train(teacher_model, tokens, tmp_path / "a", epochs=2)
    fast = train(teacher_model, tokens, tmp_path / "b", epochs=2, autocast="bf16")
    losses = [result.summary["best_loss"] for result in (fast, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


def test_untrained_replacement(teacher_model: Any, tokens: Any, tmp_path: Path) -> None:
    result = train(teacher_model, tokens, tmp_path, objective="none", kind="ffn_res")
    assert not result.state["down_proj.weight"].any()
    assert (result.curve, result.summary["steps"]) == ([], 0)


def test_seed_decides_the_result(teacher_model: Any, tokens: Any, tmp_path: Path) -> None:
    one, two = (train(teacher_model, tokens, tmp_path / w, kind="ffn") for w in "ab")
    assert all(torch.equal(one.state[name], two.state[name]) for name in one.state)


@pytest.mark.parametrize("objective", ["mse", "lm"])
def test_nan_stops_with_the_step_named(
    teacher_model: Any, tokens: Any, tmp_path: Path, objective: str
) -> None:
    with torch.no_grad():
        teacher_model.model.embed_tokens.weight[int(tokens.input_ids[0, 0])] = math.nan
    with pytest.raises(NumericsError, match=r"loss of the replacement is nan .* step \d"):
        train(teacher_model, tokens, tmp_path, objective=objective)
    assert not list(tmp_path.iterdir())


def test_infinity_stops_too(teacher_model: Any, tokens: Any, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="step"):
        train(teacher_model, tokens, tmp_path, kind="ffn", lr=1e30, epochs=4, max_grad_norm=1e30)


def test_quirk_bidirectional_layer_sees_the_future(
    teacher_model: Any, tokens: Any, tmp_path: Path
) -> None:
    causal = train(teacher_model, tokens, tmp_path / "a")
    both = train(teacher_model, tokens, tmp_path / "b", quirks=("bidirectional_layer",))
    assert both.summary["initial_loss"] != pytest.approx(causal.summary["initial_loss"], rel=1e-3)


def test_quirk_schedule_does_not_reach_the_minimum(
    teacher_model: Any, tokens: Any, tmp_path: Path
) -> None:
    """19 micro-batches of one sequence, 5 steps of 4: the last stands at 4 of 9.5 positions."""
    settings = {"batch_size": 1, "gradient_accumulation": 4, "min_lr_ratio": 0.25}
    ours = train(teacher_model, tokens, tmp_path / "a", **settings)
    quirk = {"quirks": ("schedule_per_accumulation",)}
    theirs = train(teacher_model, tokens, tmp_path / "b", **settings, **quirk)
    assert ours.summary["final_lr"] == pytest.approx(0.25 * 3e-3)
    cosine = 0.5 * (1 + math.cos(math.pi * 4 / 9.5))
    assert theirs.summary["final_lr"] == pytest.approx(3e-3 * (0.25 + 0.75 * cosine))
    wrapped = train(teacher_model, tokens, tmp_path / "c", objective="lm", **settings, **quirk)
    lrs = [row["lr"] for row in wrapped.curve if row["lr"]]
    assert min(lrs) < 0.5 * 3e-3 < lrs[-1]


@pytest.mark.parametrize(("start", "changes"), [(2, False), (3, True)])
def test_quirk_postnorm_target_matters_only_at_the_end(
    teacher_model: Any, tokens: Any, tmp_path: Path, start: int, changes: bool
) -> None:
    raw = train(teacher_model, tokens, tmp_path / "a", start=start)
    post = train(teacher_model, tokens, tmp_path / "b", start=start, quirks=("postnorm_target",))
    same = post.summary["initial_loss"] == raw.summary["initial_loss"]
    assert same is not changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"start": 4}, SparsityError, "block of 3 layers from layer 4"),
        ({"n": 0}, SparsityError, "block of 0 layers"),
        ({"kind": "none"}, RecipeError, "'none'"),
        ({"layers": 4}, RecipeError, "more than the 3 layers"),
        ({"quirks": ("schedule_per_accumulatoin",)}, RecipeError, "did you mean"),
    ],
)
def test_wrong_requests_are_refused(
    teacher_model: Any, tokens: Any, tmp_path: Path, changes: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        train(teacher_model, tokens, tmp_path / "work", **changes)
    assert not (tmp_path / "work").exists()


def test_one_sequence_is_too_few(teacher_model: Any, tokens: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="too few"):
        train(teacher_model, tokens.from_tensors(tokens.input_ids[:1]), tmp_path)


def test_unwritable_folder(teacher_model: Any, tokens: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        train(teacher_model, tokens, tmp_path / "file" / "work")


def test_recomputed_layers_give_the_same_gradients(teacher_model: Any, tokens: Any) -> None:
    model = copy.deepcopy(teacher_model).double()
    ids = tokens.input_ids[:3]
    gradients = []
    for context in (nullcontext(), recomputed(decoder_layers(model))):
        model.zero_grad()
        with context:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: each.grad.clone() for name, each in model.named_parameters()})
    assert all(torch.equal(gradients[1][name], each) for name, each in gradients[0].items())


def test_recomputation_without_a_use_is_refused(
    teacher_model: Any, tokens: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=r"gradient_checkpointing.*'lm'"):
        train(teacher_model, tokens, tmp_path, objective="mse", gradient_checkpointing=True)


def test_layers_that_run_again_in_the_backward_pass_train_the_same(
    teacher_model: Any, tokens: Any, tmp_path: Path
) -> None:
    runs = []
    layer = teacher_model.model.layers[4]  # behind the replacement, so that gradients go through
    handle = layer.self_attn.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    settings = {"objective": "lm", "start": 1, "n": 2}
    plain = train(teacher_model, tokens, tmp_path / "plain", **settings)
    once, runs[:] = sum(runs), []
    changes = {**settings, "gradient_checkpointing": True}
    again = train(teacher_model, tokens, tmp_path / "again", **changes)
    handle.remove()
    assert sum(runs) == 2 * once
    assert "forward" not in vars(layer)
    for name, tensor in plain.state.items():
        assert torch.equal(tensor, again.state[name])
