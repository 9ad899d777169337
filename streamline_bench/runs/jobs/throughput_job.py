"""Measures how fast the rows' models generate, all in one job so that they take turns."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamline_bench.core.files.staging import staged_output
from streamline_bench.runs.jobs.worker import Product

__all__ = ["measure_rows"]


def measure_rows(run: Path, name: str, payload: Mapping[str, Any]) -> Product:
    """Write ``throughput/throughput.json``; a model that cannot be measured is a failed entry.

    Raises:
        ThroughputError: none can be measured.
        MissingDependencyError: the engine is not installed.
    """
    from streamline_bench.core.checkpoint.folder import resolve_pretrained
    from streamline_bench.throughput import Setup, Workload, measure

    models = {
        label: run / folder
        if folder is not None
        else resolve_pretrained(payload["pretrained"], payload["revision"])
        for label, folder in payload["models"].items()
    }
    with staged_output(run / payload["output"], overwrite=True) as staging:
        measure(
            models,
            dense=payload["dense"],
            engine=payload["engine"],
            workload=Workload.model_validate(payload["workload"]),
            setup=Setup(
                device=payload["device"],
                dtype=payload["dtype"] or "auto",
                threads=payload["threads"],
                trust_remote_code=payload["trust_remote_code"],
            ),
            output=staging,
            progress=False,
        )
    return Product([payload["output"]], command=_command(run, payload))


def _command(run: Path, payload: Mapping[str, Any]) -> str:
    asked = payload["workload"]
    words = ["streamline-bench", "throughput"]
    for label, folder in payload["models"].items():
        words.append(f"{label}={payload['pretrained'] if folder is None else run / folder}")
    options = {
        "--dense": payload["dense"],
        "--engine": payload["engine"],
        "--batch": ",".join(map(str, asked["batch_sizes"])),
        "--prompt-tokens": asked["prompt_tokens"],
        "--output-tokens": asked["output_tokens"],
        "--rounds": asked["rounds"],
        "--warmup-rounds": asked["warmup_rounds"],
        "--seed": asked["seed"],
        "--device": payload["device"],
        "--dtype": payload["dtype"] or "auto",
        "--threads": payload["threads"],
        "--revision": payload["revision"],
    }
    words += [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    words += ["--prefix-caching"] * bool(asked["prefix_caching"])
    return shlex.join([*words, *(["--trust-remote-code"] * payload["trust_remote_code"])])
