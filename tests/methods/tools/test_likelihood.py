"""The summed loss: equal to transformers' own without pads, blind to pads."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_in_memory import keep_layers
from transformers import AutoModelForCausalLM

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.errors import CalibrationError, NumericsError
from streamline_bench.methods.tools.likelihood import (
    affordable_batch,
    count_targets,
    next_token_loss,
    skip_losses,
)

IDS = torch.tensor([[1, 5, 9, 40, 22, 7], [3, 8, 2, 60, 33, 12]])


def test_equals_the_loss_of_transformers(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).eval()
    with torch.no_grad():
        output = model(IDS, labels=IDS)
    loss = next_token_loss(output.logits, IDS, torch.ones_like(IDS).bool())
    assert loss.dtype == torch.float64
    assert loss.item() / 10 == pytest.approx(output.loss.item(), rel=1e-6)


def test_pads_do_not_count() -> None:
    logits = torch.randn(2, 6, 100, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    by_hand = -sum(logits[0, t].log_softmax(-1)[IDS[0, t + 1]] for t in range(3))
    loss = next_token_loss(logits.bfloat16(), IDS, mask)
    assert loss.dtype == torch.float32
    assert next_token_loss(logits, IDS, mask).item() == pytest.approx(float(by_hand), rel=1e-6)
    assert count_targets(CalibrationTokens.from_tensors(IDS, mask)) == 3


def test_single_tokens_predict_nothing() -> None:
    with pytest.raises(CalibrationError, match="none follows another"):
        count_targets(CalibrationTokens.from_tensors(IDS[:, :1]))


@pytest.fixture(scope="module")
def folder(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model("llama", initializer_range=0.2, seed=2)


@pytest.fixture(scope="module")
def tokens() -> CalibrationTokens:
    """Eleven sequences (more than one batch), a few of them padded."""
    ids = torch.randint(4, 100, (11, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(11, 12, dtype=torch.bool)
    mask[2, 7:] = mask[5, 3:] = mask[9, 1:] = False
    return CalibrationTokens.from_tensors(ids, mask)


def _straightforward(model: Any, tokens: CalibrationTokens, removed: list[int]) -> float:
    """Mean loss of a pruned copy, one unpadded sequence at a time, by log-softmax."""
    pruned = copy.deepcopy(model)
    keep_layers(pruned, [i for i in range(6) if i not in removed])
    total, count = 0.0, 0
    for row, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True):
        ids = row[mask]
        with torch.no_grad():
            logits = pruned(ids[None]).logits[0]
        for position in range(len(ids) - 1):
            total -= logits[position].log_softmax(-1)[ids[position + 1]].item()
            count += 1
    return total / count


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("removed", [[], [1], [2, 4]])
def test_equals_separate_models(
    folder: Path, tokens: CalibrationTokens, removed: list[int], dtype: torch.dtype, rel: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    candidates = [layer for layer in range(6) if layer not in removed]
    losses = skip_losses(model, tokens, candidates, removed=removed, progress=False)
    expected = {c: _straightforward(model, tokens, [*removed, c]) for c in candidates}
    assert losses == pytest.approx(expected, rel=rel)
    assert len(set(losses.values())) == len(candidates)


def test_does_not_depend_on_the_batches(folder: Path, tokens: CalibrationTokens) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    small = 12 * (7 * 32 + 3 * 100) * 8 / 1e9
    assert affordable_batch(model, tokens, 6, small * 2.5) == 2
    few = skip_losses(model, tokens, [1, 2], activations_gb=small * 2.5, progress=False)
    assert few == pytest.approx(skip_losses(model, tokens, [1, 2], progress=False), rel=1e-12)


def test_a_sequence_beyond_the_memory_is_refused(folder: Path, tokens: CalibrationTokens) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CalibrationError, match=r"2\.52e-05 GB.*activations_gb.*1e-06"):
        skip_losses(model, tokens, [1], activations_gb=1e-6, progress=False)


def test_nan_names_the_layer(folder: Path, tokens: CalibrationTokens) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[3].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"NaN.*layer 3\b"):
        skip_losses(model, tokens, [3, 1], progress=False)
    model.model.layers[4].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"NaN.*layer 4\b"):
        skip_losses(model, tokens, [1], removed=[3], progress=False)


def test_a_layer_without_which_the_loss_is_no_number_is_named(
    folder: Path, tokens: CalibrationTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = itertools.cycle([torch.tensor(1.0), torch.tensor(torch.nan)])
    module = sys.modules[skip_losses.__module__]
    monkeypatch.setattr(module, "next_token_loss", lambda *_: next(losses))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(NumericsError, match=r"layer 1\b.*nan"):
        skip_losses(model, tokens, [3, 1], progress=False)


def test_the_memory_of_one_batch_is_held(
    folder: Path, tokens: CalibrationTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States of an earlier batch are gone when the next one's are recorded."""
    import weakref

    from streamline_bench.core.forward import PartialForward

    seen: list[Any] = []
    alive: list[int] = []
    original = PartialForward.hidden

    def hidden(self: PartialForward, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = original(self, *args, **kwargs)
        alive.append(sum(reference() is not None for reference in seen))
        seen.extend(weakref.ref(state) for state in self.states.values())
        return output

    monkeypatch.setattr(PartialForward, "hidden", hidden)
    model = AutoModelForCausalLM.from_pretrained(folder)
    skip_losses(model, tokens, [1, 2], activations_gb=4e-5, progress=False)
    assert len(alive) == 11
    assert max(alive) == 0
