"""Distillation of logits: the student's distribution of the next token drawn to the dense model's.

The dense model runs once over all sequences. Of each position its largest log-probabilities are
kept in a file, and the probability of all other tokens together, so that what is compared are two
distributions over ``top_k + 1`` outcomes: with all tokens the Kullback-Leibler divergence itself,
with fewer a lower bound of it (Hinton et al., arXiv:1503.02531; the gradient is scaled by the
squared temperature as there).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.files import atomic_write_text, sync_path
from streamline_bench.core.forward import evaluating, sent
from streamline_bench.core.machine.ranks import current
from streamline_bench.core.recipe.schema import DistillationSpec
from streamline_bench.core.state_store import create_mapped, open_mapped
from streamline_bench.core.training.batch import Batch, make_batch, predicted
from streamline_bench.core.training.head import loss_of_logits

log = logging.getLogger(__name__)

LOGITS_AT_ONCE = 1 << 28
"""Logits of the dense model that are held at a time, unless those of one sequence are more."""

_REMEDY = "lower training.kd.top_k"


class TeacherLogits:
    """The dense model's largest log-probabilities at all positions of a set of sequences.

    ``[2, n, T, top_k + 1]`` in a memory-mapped file: ``[0]`` float32 log-probabilities at the
    temperature, of all other tokens together in the last column; ``[1]`` token ids as int32.
    Several processes fill it together. An earlier attempt's file with the same key is taken up.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(
        self, path: Path, key: str, model: Any, tokens: CalibrationTokens, spec: DistillationSpec,
        *, device: torch.device, progress: bool,
    ) -> None:  # fmt: skip
        vocabulary = int(model.config.get_text_config().vocab_size)
        self._spec = spec
        self._top = min(spec.top_k, vocabulary)
        shape = [2, *tokens.input_ids.shape, self._top + 1]
        described, description = path.with_suffix(".json"), {"key": key, "shape": shape}

        def ready() -> bool:
            if described.is_file() and json.loads(described.read_text("utf-8")) == description:
                return path.is_file()
            create_mapped(path, shape, torch.float32, _REMEDY)
            return False

        done = current().first(ready)
        self._values = open_mapped(path, shape, torch.float32)
        if done:
            log.info("distillation: reusing %s", path.name)
            return
        size = max(LOGITS_AT_ONCE // (tokens.input_ids.shape[1] * vocabulary), 1)
        batches = torch.split(torch.arange(len(tokens)), size)
        own = batches[current().rank :: current().count]
        with evaluating(model, frozen=True), torch.no_grad():
            for rows in tqdm(own, desc="dense logits", unit="batch", disable=not progress):
                self._fill(model, make_batch(tokens, rows, device))
        current().wait()

        def describe() -> None:
            sync_path(path)
            atomic_write_text(described, json.dumps(description))

        current().first(describe)

    def _fill(self, model: Any, batch: Batch) -> None:
        output = model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
        for row, logits in zip(batch.rows.tolist(), output.logits, strict=True):
            scaled = logits.float() / self._spec.temperature
            ids = scaled.topk(self._top, dim=-1).indices
            self._values[0, row, : len(ids)] = outcomes(scaled, ids).cpu()
            self._values[1, row, : len(ids), :-1].view(torch.int32).copy_(ids.int().cpu())

    def of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return token ids ``[batch, seq, top_k]`` and log-probabilities ``[…, top_k + 1]``."""
        used, device = batch.ids.shape[1], batch.ids.device
        logs, ids = self._values[:, batch.rows, :used]
        ids = ids[..., :-1].contiguous().view(torch.int32)
        return sent(ids, device).long(), sent(logs, device)


def outcomes(logits: Tensor, ids: Tensor) -> Tensor:
    """Return log-probabilities of some tokens, and of all others together in the last column.

    Args:
        logits: float32 ``[positions, vocabulary]``; ids: int64 ``[positions, k]``.
    """
    total = logits.logsumexp(dim=-1, keepdim=True)
    others = logits.scatter(-1, ids, float("-inf")).logsumexp(dim=-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), others], dim=-1) - total


class KdObjective:
    """Divergence of the student's next token from the dense model's, in nats times temperature².

    One term per token that has a predecessor, as for the loss of the next token.
    """

    def __init__(self, model: nn.Module, spec: DistillationSpec) -> None:
        self.model: nn.Module | None = model
        self._spec = spec

    def loss_sum(self, batch: Batch, source: Any) -> Tensor:
        """Return the sum of the losses of all terms of a batch, a float32 scalar."""
        ids, logs = (part.flatten(0, 1)[batch.predicting] for part in source.of(batch))
        temperature = self._spec.temperature

        def loss(logits: Tensor, numbers: Tensor) -> Tensor:
            given, dense = outcomes(logits.float() / temperature, ids[numbers]), logs[numbers]
            share = dense.exp()
            never = share == 0  # -inf - -inf, where all tokens are kept
            gap = dense.masked_fill(never, 0) - given.masked_fill(never, 0)
            value: Tensor = (share * gap).sum() * temperature**2
            return value

        return loss_of_logits(self.model, batch.ids, batch.mask, batch.predicting, loss)

    def terms(self, mask: Tensor, targets: Tensor | None = None) -> int:
        """Return the number of terms of a batch with these masks ``[batch, seq]``."""
        return int(predicted(mask, targets).sum())


def teacher_logits(
    work: Path, key: str, model: Any, sets: Sequence[CalibrationTokens], spec: DistillationSpec,
    *, device: torch.device, progress: bool,
) -> list[TeacherLogits]:  # fmt: skip
    """Let the dense model run over training and held-out sequences.

    Args:
        key: of model, tokens and computation.
    """
    return [
        TeacherLogits(
            work / f"teacher_{name}.bin", f"{key} {spec.model_dump_json()} {tokens.sha256}", model,
            tokens, spec, device=device, progress=progress,
        )
        for name, tokens in zip(("training", "validation"), sets, strict=True)
    ]  # fmt: skip
