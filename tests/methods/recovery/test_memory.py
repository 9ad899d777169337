"""What a recovery holds at once, and that letting go of the rest changes no bit of its result."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_bench.compression import compress
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.core.training import loop
from streamline_bench.methods.recovery import recover as recovery

OPTIONS: dict[str, Any] = {
    "recovery.training.data.sequence_length": 16,
    "recovery.training.min_steps": 8,
    "recovery.training.batch_size": 4,
    "recovery.training.lr": 3e-3,
    "recovery.training.checkpoint_every": 3,
}


class Alive:
    """Counts which of the tensors it was shown still exist."""

    def __init__(self) -> None:
        self._seen: list[weakref.ref[torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self._seen)

    def show(self, *tensors: torch.Tensor) -> None:
        self._seen.extend(weakref.ref(tensor) for tensor in tensors)

    def count(self) -> int:
        return sum(reference() is not None for reference in self._seen)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_recovered_weights_are_made_one_at_a_time(
    kind: str,
    tiny_llama: Path,
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merged, cast, most = Alive(), Alive(), [0]
    original = recovery._as_stored

    def watched(reader: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
        result = original(reader, name, weight.clone())
        merged.show(weight)
        cast.show(result)
        most[0] = max(most[0], merged.count(), cast.count())
        return result

    monkeypatch.setattr(recovery, "_as_stored", watched)
    recipe = make_recipe("last_layers", **OPTIONS, **{"recovery.kind": kind})
    compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    assert len(cast) >= 4 * 7
    assert most[0] <= 3  # the one before lives until its successor is there


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_copies_for_a_checkpoint_are_let_go(
    kind: str,
    tiny_llama: Path,
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies, alive_in_steps = Alive(), []
    save, load, step = loop.save_state, loop.load_state, loop.Loop._step

    def saved(folder: Path, key: str, state: Any) -> None:
        save(folder, key, state)
        copies.show(*state.weights.values())

    def loaded(folder: Path, key: str, **options: Any) -> Any:
        state = load(folder, key, **options)
        if state is not None:
            copies.show(*state.weights.values())
        return state

    def stepped(self: Any, *arguments: Any) -> float:
        alive_in_steps.append(copies.count())
        assert not self.state.moments
        if self.state.step == 5 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return step(self, *arguments)

    stopped: list[bool] = []
    monkeypatch.setattr(loop, "save_state", saved)
    monkeypatch.setattr(loop, "load_state", loaded)
    monkeypatch.setattr(loop.Loop, "_step", stepped)
    recipe = make_recipe("last_layers", **OPTIONS, **{"recovery.kind": kind})
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    assert len(copies) > 0
    assert set(alive_in_steps) == {0}


@pytest.mark.parametrize("kind", ["lora", "partial", "full"])
def test_stopped_and_resumed_gives_the_same_bytes(
    kind: str,
    tiny_llama: Path,
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped two steps behind a checkpoint: these are lost, and done again."""
    changes = (
        {"recovery.kind": kind, "recovery.dropout": 0.3}
        if kind == "lora"
        else {"recovery.kind": kind}
    )
    recipe = make_recipe("last_layers", **OPTIONS, **changes)
    whole = compress(tiny_llama, recipe, tmp_path / "whole", progress=False)
    step, steps = loop.Loop._step, []

    def stepped(self: Any, *arguments: Any) -> float:
        steps.append(self.state.step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(loop.Loop, "_step", stepped)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_llama, recipe, tmp_path / "resumed", progress=False)
    resumed = compress(tiny_llama, recipe, tmp_path / "resumed", progress=False)
    assert steps[:8] == [0, 1, 2, 3, 4, 5, 3, 4]
    digests = {
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in (whole, resumed)
    }
    assert len(digests) == 1
