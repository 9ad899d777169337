"""One pass over the calibration tokens: the similarity of every pair of layer boundaries.

For each token the ``L + 1`` states form a Gram matrix ``H Hᵀ`` of size ``[L + 1, L + 1]``; scaled
by its diagonal it holds all cosines at once. A batched product over the tokens thus serves every
block size, at ``(L + 1)² d`` multiplications per token against some ``12 L d²`` of the model
itself. Of a model in memory only the states of one batch are held. The LM head is not run.

Of a streamed model (:mod:`.streaming`) each layer is read once: all batches go through it, and the
states of all boundaries are kept until the last layer has run. The numbers are the same.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from streamline_bench.core.boundaries import boundary_passes
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import evaluating, sent
from streamline_bench.core.similarity import LastState, Similarity
from streamline_bench.errors import NumericsError

_CHUNK_BYTES = {"cpu": 1 << 22}  # fits a cache; accelerators get more
_CHUNK_BYTES_ACCELERATOR = 1 << 28
_CHECKED_AT_ONCE = ("cpu",)
"""Devices that are asked for NaN after each batch; others would have to be waited for."""


def scan(
    model: Any,
    tokens: CalibrationTokens,
    *,
    last_state: LastState = "raw",
    batch_size: int = 1,
    work: Path | None = None,
    progress: bool = True,
) -> Similarity:
    """Run the model once over the tokens and compare all boundaries.

    Cosines are taken in float32 (float64 for a float64 model) whatever the model's dtype, and
    their sums in float64. Memory does not depend on the number of samples: it is that of one
    forward pass plus ``(L + 1) * batch_size * T * hidden`` values.

    Args:
        model: a causal LM, on any device; its mode and weights are left alone.
        last_state: ``raw`` compares the last layer's own output; ``postnorm`` the final norm's,
            as implementations that read ``output_hidden_states`` do.
        batch_size: sequences per forward pass; the result does not depend on it beyond rounding.
        work: folder for states of a streamed model that exceed the memory.

    Raises:
        ArchitectureError: the family is not supported.
        CheckpointError: a streamed model's checkpoint is damaged.
        NumericsError: a hidden state is NaN or infinite; its layer and sample are named.
        OutputError: the states of a streamed model exceed the memory and the disk.
    """
    sums = _Sums()
    with (
        torch.no_grad(),
        evaluating(model),
        boundary_passes(
            model, tokens, batch_size, last_state=last_state, work=work, progress=progress
        ) as passes,
        tqdm(
            total=tokens.num_tokens, unit="tok", desc="scan", delay=2, disable=not progress
        ) as bar,
    ):
        for each in passes:
            kept = None if bool(each.mask.all()) else each.mask
            sums.add(each.states, kept, _last_tokens(each.mask))
            bar.update(int(each.mask.sum()))
    faulty = sums.faulty_batch()
    if faulty is not None:
        _name_fault(model, tokens, faulty, batch_size)
    return sums.similarity(tokens, last_state, {"calibration": tokens.summary()})


class _Sums:
    """Float64 sums over tokens (cosine) and samples (angular distance), on the states' device."""

    def __init__(self) -> None:
        self._cosine: Tensor | None = None
        self._angular: Tensor | None = None
        self._samples = 0
        self._finite: list[Tensor] = []

    def add(self, states: Tensor, mask: Tensor | None, last: Tensor) -> None:
        """Add a batch: states ``[L + 1, B, T, d]``, mask ``[B, T]`` or None, last ``[B]``.

        Mask and last are on the CPU. An accelerator is not waited for.
        """
        cosine = _cosine_sums(states, mask)
        angular = _angular_sums(states, last)
        finite = torch.isfinite(cosine).all()
        if states.device.type not in _CHECKED_AT_ONCE:
            self._finite.append(finite)
        elif not bool(finite):
            raise _not_finite(states, mask, self._samples)
        self._cosine = cosine if self._cosine is None else self._cosine + cosine
        self._angular = angular if self._angular is None else self._angular + angular
        self._samples += states.shape[1]

    def faulty_batch(self) -> int | None:
        """Return the first batch with NaN or infinity that was not refused at once."""
        finite = torch.stack(self._finite).tolist() if self._finite else []
        return finite.index(False) if False in finite else None

    def similarity(
        self, tokens: CalibrationTokens, last_state: LastState, details: dict[str, Any]
    ) -> Similarity:
        assert self._cosine is not None
        assert self._angular is not None
        cosine = (self._cosine.cpu() / tokens.num_tokens).clamp(-1.0, 1.0)
        angular = self._angular.cpu() / self._samples
        # By definition; rounding leaves 1 - 1e-7 and arccos makes that 1e-4.
        cosine.fill_diagonal_(1.0)
        angular.fill_diagonal_(0.0)
        return Similarity(
            ((cosine + cosine.T) / 2).numpy(),
            ((angular + angular.T) / 2).numpy(),
            tokens.num_tokens,
            len(tokens),
            last_state,
            details,
        )


def _name_fault(model: Any, tokens: CalibrationTokens, number: int, batch_size: int) -> None:
    """Run a batch again and raise the error that names the place of its NaN or infinity."""
    rows = slice(number * batch_size, (number + 1) * batch_size)
    one = CalibrationTokens.from_tensors(tokens.input_ids[rows], tokens.attention_mask[rows])
    with (
        torch.no_grad(),
        evaluating(model),
        boundary_passes(model, one, batch_size, progress=False) as passes,
    ):
        each = next(passes)
        raise _not_finite(each.states, each.mask, rows.start)


def _cosine_sums(states: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sum over unmasked tokens of all pairs' cosines, float64 ``[L + 1, L + 1]``."""
    boundaries, batch, length, hidden = states.shape
    flat = states.reshape(boundaries, batch * length, hidden)
    kept = None if mask is None else mask.reshape(-1).cpu()
    dtype = torch.promote_types(states.dtype, torch.float32)
    budget = _CHUNK_BYTES.get(states.device.type, _CHUNK_BYTES_ACCELERATOR)
    chunk = max(budget // (boundaries * hidden * dtype.itemsize), 16)
    # MPS has no float64: there the sums of a chunk and of a batch are taken in float32.
    wide = torch.float32 if states.device.type == "mps" else torch.float64
    total = torch.zeros(boundaries, boundaries, dtype=wide, device=states.device)
    with _full_precision(states.device):
        for start in range(0, batch * length, chunk):
            h = flat[:, start : start + chunk].to(dtype).transpose(0, 1)
            gram = torch.bmm(h, h.transpose(1, 2))
            inverse = gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(dtype).tiny).rsqrt()
            cosine = gram.mul_(inverse[:, :, None]).mul_(inverse[:, None, :])
            if kept is not None:
                # Counted on the host: a boolean index would wait for the accelerator.
                rows = kept[start : start + chunk].nonzero()[:, 0]
                cosine = cosine[sent(rows, states.device)]
            total += cosine.sum(0, dtype=wide)
    return _widened(total)


def _widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on its device; on the CPU for MPS, which has none."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def _angular_sums(states: Tensor, last: Tensor) -> Tensor:
    """Return the sum over samples of ``arccos(cos) / pi`` at the last token, ``[L + 1, L + 1]``."""
    rows = torch.arange(states.shape[1], device=states.device)
    h = _widened(states[:, rows, sent(last, states.device)])
    h = nn.functional.normalize(h, dim=-1, eps=1e-300).transpose(0, 1)
    cosine = torch.bmm(h, h.transpose(1, 2)).clamp_(-1.0, 1.0)
    return cosine.arccos().sum(0) / math.pi


def _last_tokens(mask: Tensor) -> Tensor:
    """Return the column of each row's last token, int64 ``[B]``."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return (columns * mask).amax(dim=1)


def _not_finite(states: Tensor, mask: Tensor | None, first_sample: int) -> NumericsError:
    bad = ~torch.isfinite(states.float().square().sum(-1))
    if mask is not None:
        bad &= mask.to(bad.device)
    boundary, sample, token = bad.nonzero()[0].tolist()
    where = f"of layer {boundary - 1}" if boundary else "of the embeddings"
    return NumericsError(
        f"The output {where} is NaN, infinite or too large for calibration sample "
        f"{first_sample + sample}, token {token}; check the weights, or try another dtype."
    )


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No TF32, no bfloat16, no autocast: neighbouring cosines differ in the third decimal."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
