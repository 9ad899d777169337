"""Texts that the dense model writes itself, as calibration or training data (source ``self``).

They are drawn from the model's own distribution, at temperature 1 and without cuts, so that they
need no corpus (arXiv:2410.17170 calibrates with such texts). Numbers are drawn on the CPU.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.data.corpora import SELF
from streamline_bench.core.files import atomic_write_bytes
from streamline_bench.core.forward import evaluating
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.errors import CalibrationError

log = logging.getLogger(__name__)

SELF_VERSION = 1
"""Part of the key of what is made with such texts; raised when the same seed gives other texts."""

_TOGETHER = 16


def count_of(spec: CalibrationSpec, length: int) -> int:
    """Return how many sequences are written.

    Raises:
        CalibrationError: no number is given, or the form is not ``packed``.
    """
    if spec.form != "packed":
        raise CalibrationError(
            f"A model writes no data of form '{spec.form}'; use form packed with source self."
        )
    wanted = -(-spec.tokens // length) if spec.tokens is not None else None
    counts = [count for count in (spec.samples, wanted) if count is not None]
    if not counts:
        raise CalibrationError(
            "Source self needs a size; give samples (sequences) or tokens, e.g. "
            "calibration.samples=128."
        )
    return min(counts)


@torch.no_grad()
def write_texts(
    model: Any, tokenizer: Any, spec: CalibrationSpec, *, length: int, progress: bool = True
) -> Tensor:
    """Return sequences that the model writes, int64 ``[n, length]``.

    Each begins with the tokenizer's BOS token, or its EOS token, or one drawn at random; where a
    text ends, the next one goes on behind the EOS token.

    Raises:
        CalibrationError: what :func:`count_of` raises.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    known = min(len(tokenizer), int(model.config.get_text_config().vocab_size))
    begin = tokenizer.bos_token_id
    begin = tokenizer.eos_token_id if begin is None else begin
    count, rows = count_of(spec, length), []
    with evaluating(model, frozen=True):
        for first in tqdm(
            range(0, count, _TOGETHER), desc="own texts", unit="batch", disable=not progress
        ):
            size = min(_TOGETHER, count - first)
            start = torch.randint(known, (size, 1), generator=generator)
            start = start if begin is None else torch.full_like(start, begin)
            rows.append(_continued(model, start, length, known, generator))
    return torch.cat(rows)


def _continued(
    model: Any, start: Tensor, length: int, known: int, generator: torch.Generator
) -> Tensor:
    """Return texts that begin with ``start`` ``[batch, 1]``, int64 ``[batch, length]``."""
    device = model.get_input_embeddings().weight.device
    written, kept = [start], dict[str, Any]()
    for _ in range(length - 1):
        # A model without a cache of keys and values reads all of the text again.
        given = written[-1] if kept else torch.cat(written, dim=1)
        output = model(input_ids=given.to(device), use_cache=True, **kept)
        cache = getattr(output, "past_key_values", None)
        kept = {} if cache is None else {"past_key_values": cache}
        logits = output.logits[:, -1, :known].float().cpu()
        if not bool(logits.isfinite().all()):
            raise CalibrationError(
                "The model's own texts cannot be drawn, because its logits are not finite; check "
                "its weights, or give another calibration source."
            )
        written.append(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))
    return torch.cat(written, dim=1)


def own_tokens(
    model: Any, tokenizer: Any, spec: CalibrationSpec, file: Path, *, length: int, progress: bool
) -> CalibrationTokens:
    """Return the texts of ``file``, which the model writes where it is missing."""
    if not file.is_file():
        log.info("calibration: the model writes its own texts")
        ids = write_texts(model, tokenizer, spec, length=length, progress=progress)
        atomic_write_bytes(file, save({"ids": ids}))
    ids = load_file(file)["ids"]
    mask = torch.ones_like(ids, dtype=torch.bool)
    if spec.tokens is not None:
        mask = torch.arange(ids.numel()).view_as(ids) < spec.tokens
        ids = ids.where(mask, 0)
    return CalibrationTokens.from_tensors(ids, mask, SELF)
