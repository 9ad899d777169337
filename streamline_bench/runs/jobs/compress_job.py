"""Compresses the model of a run by one recipe."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.errors import CheckpointError
from streamline_bench.runs.folder import job_folder
from streamline_bench.runs.jobs.worker import Product

if TYPE_CHECKING:
    from streamline_bench.core.recipe.schema import Recipe

__all__ = ["compress_row"]


def compress_row(run: Path, name: str, payload: Mapping[str, Any]) -> Product:
    """Write the row's checkpoint, or take the whole one that an earlier attempt published.

    Interrupted training is kept in the run folder, so the next attempt resumes it.

    Raises:
        StreamlineBenchError: what compressing raises; CheckpointError: the model is another one
            than that of the plan.
    """
    import torch

    from streamline_bench.compression.pipeline import compress
    from streamline_bench.core.checkpoint.folder import resolve_pretrained
    from streamline_bench.core.checkpoint.reader import CheckpointReader
    from streamline_bench.core.recipe.schema import parse_recipe

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    recipe = parse_recipe(payload["recipe"], "The row's recipe")
    folder = resolve_pretrained(payload["pretrained"], payload["revision"])
    found = CheckpointReader(folder).fingerprint(progress=False)
    if found != payload["weights_sha256"]:
        raise CheckpointError(
            f"{payload['pretrained']} is not the model this run was started with (its weights "
            "differ); give another --output."
        )
    output = run / payload["output"]
    if not _is_published(output, recipe.model_dump(mode="json"), found):
        compress(
            payload["pretrained"],
            recipe,
            output,
            revision=payload["revision"],
            cache=run / "jobs" / ".compressing",
            device=payload["device"],
            dtype=payload["dtype"],
            trust_remote_code=payload["trust_remote_code"],
            overwrite=True,
            progress=False,
        )
    command = _command(run, name, payload, recipe)
    return Product([payload["output"]], command=command, facts=_facts(output))


def _command(run: Path, name: str, payload: Mapping[str, Any], recipe: Recipe) -> str:
    """What a reader can type; the complete recipe is written beside the job for it."""
    import yaml

    path = job_folder(run, name) / "recipe.yaml"
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    atomic_write_text(path, text)
    options = {
        "--recipe": path,
        "--revision": payload["revision"],
        "--device": payload["device"],
        "--dtype": payload["dtype"],
        "--output": run / payload["output"],
    }
    words = ["streamline-bench", "compress", payload["pretrained"]]
    words += [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    return shlex.join([*words, *(["--trust-remote-code"] * payload["trust_remote_code"])])


def _is_published(output: Path, recipe: Mapping[str, Any], weights: str) -> bool:
    """Whether an attempt was stopped between publishing the checkpoint and saying so."""
    from streamline_bench.core.checkpoint.manifest import read_manifest, verify_files

    try:
        manifest = read_manifest(output)
        if manifest is None:
            return False
        verify_files(output, manifest)
    except CheckpointError:
        return False
    return manifest.recipe == recipe and manifest.source.weights_sha256 == weights


def _facts(output: Path) -> dict[str, Any]:
    from streamline_bench.core.checkpoint.manifest import read_manifest

    manifest = read_manifest(output)
    if manifest is None:  # pragma: no cover - compress writes it last
        raise CheckpointError(f"{output} has no manifest.")
    return {
        "layers_before": manifest.layers_before,
        "layers_after": manifest.layers_after,
        "sparsity_reached": manifest.sparsity_reached,
    }
