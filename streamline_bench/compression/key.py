"""The name of a compressed checkpoint in the cache: a hash of all that decides its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from streamline_bench.core.checkpoint.folder import tokenizer_files
from streamline_bench.core.data.corpora import local_paths
from streamline_bench.core.data.corpus_files import file_kind
from streamline_bench.core.recipe.schema import CalibrationSpec, Recipe
from streamline_bench.core.training.trainer import TRAINING_VERSION
from streamline_bench.methods.base import method_facts
from streamline_bench.methods.recovery.recover import RECOVERY_VERSION, recovery_data
from streamline_bench.modeling.loading import dtype_name
from streamline_bench.modeling.source_model import SourceModel

SHARED_VERSION = 4
"""Part of every key; raised when what all methods share gives other tensors for the same recipe:
calibration text, the scan, how tensors are composed and stored. Changes of one method raise its
``Method.version``, of training ``TRAINING_VERSION``, of recovery ``RECOVERY_VERSION``."""


def content_key(
    source: SourceModel, recipe: Recipe, *, device: str = "cpu", dtype: str | None = None
) -> str:
    """Return a SHA-256 (hex) of weights, tokenizer, recipe, data, method and computation.

    Args:
        device: that computes; only its type counts (``cuda:1`` gives the same as ``cuda``).
        dtype: of the source model in memory; None for float32.

    Raises:
        RecipeError: there is no such dtype.
        CheckpointError: a file cannot be read.
    """
    folder = source.folder
    payload = {
        "shared": SHARED_VERSION,
        "method": method_facts(recipe.method),
        "weights": source.weights_sha256,
        # Where generation stops is stored beside the tokenizer, and copied into the result.
        "tokenizer": _digests(
            source, folder, [*tokenizer_files(folder), *folder.glob("generation_config.json")]
        ),
        "recipe": recipe.content_hash(),
        "calibration": _data_identity(recipe.calibration, source),
        "training": _data_identity(recipe.training.data, source),
        "device": device.partition(":")[0],
        "dtype": dtype_name(dtype),
    }
    if recipe.replacement.kind != "none":
        payload["training_version"] = TRAINING_VERSION
    recovery = recovery_data(recipe)
    if recovery is not None:
        payload["recovery"] = _data_identity(recovery, source)
        payload["recovery_version"] = [TRAINING_VERSION, RECOVERY_VERSION]
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def _data_identity(spec: CalibrationSpec, source: SourceModel) -> str | dict[str, str]:
    """Content of a local source, name of a remote one; read without tokenising anything."""
    paths = local_paths(spec.source, source.folder)
    if not paths or not all(path.is_dir() or (path.exists() and file_kind(path)) for path in paths):
        return spec.source  # on the hub; or not to be read, as its reader will say
    if paths[0].is_dir():
        return _digests(source, paths[0], sorted(p for p in paths[0].rglob("*") if p.is_file()))
    if len(paths) == 1:
        return _digests(source, paths[0].parent, paths)
    return {f"{n} {path.name}": source.file_sha256(path) for n, path in enumerate(paths)}


def _digests(source: SourceModel, root: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 (hex) of files, by path below ``root``."""
    return {path.relative_to(root).as_posix(): source.file_sha256(path) for path in paths}
