"""Compares one row's next-token distributions with the dense model's, on the run's text."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.runs.jobs.worker import Product
from streamline_bench.runs.planning.plan import TextPlan

__all__ = ["compare_text"]

_TOKENS = 2048
"""Read at once, in as many windows as that takes; the logits of both models are in memory."""


def compare_text(run: Path, name: str, payload: Mapping[str, Any]) -> Product:
    """Write ``<label>/divergence.json``.

    Raises:
        StreamlineBenchError: what reading the text or comparing on it raises.
    """
    from streamline_bench.core.checkpoint.folder import resolve_pretrained
    from streamline_bench.divergence import read_texts, token_divergence

    text = TextPlan.model_validate(payload["text"])
    batch_size = max(1, _TOKENS // text.window)
    result = token_divergence(
        resolve_pretrained(payload["pretrained"], payload["revision"]),
        run / payload["checkpoint"],
        itertools.islice(read_texts(Path(text.file), text.field), text.documents),
        window=text.window,
        batch_size=batch_size,
        device=payload["device"],
        dtype=payload["dtype"],
        trust_remote_code=payload["trust_remote_code"],
        progress=False,
    )
    atomic_write_text(run / payload["output"], result.model_dump_json(indent=2) + "\n")
    return Product([payload["output"]], command=_command(run, payload, text, batch_size))


def _command(run: Path, payload: Mapping[str, Any], text: TextPlan, batch_size: int) -> str:
    options = {
        "--text-field": text.field,
        "--documents": text.documents,
        "--window": text.window,
        "--batch-size": batch_size,
        "--device": payload["device"],
        "--dtype": payload["dtype"],
        "--revision": payload["revision"],
    }
    words = ["streamline-bench", "divergence", payload["pretrained"]]
    words += [str(run / payload["checkpoint"]), text.file]
    words += [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    return shlex.join([*words, *(["--trust-remote-code"] * payload["trust_remote_code"])])
