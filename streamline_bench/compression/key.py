"""The name of a compressed checkpoint in the cache: a hash of all that decides its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from streamline_bench.core.checkpoint.folder import tokenizer_files
from streamline_bench.core.data.corpora import local_path
from streamline_bench.core.recipe.schema import CalibrationSpec, Recipe
from streamline_bench.methods.recovery.recover import recovery_data
from streamline_bench.modeling.loading import dtype_name
from streamline_bench.modeling.source_model import SourceModel

__all__ = ["content_key"]

ALGORITHM_VERSION = 3
"""Part of every key; raised when the same recipe would give other weights."""


def content_key(
    source: SourceModel, recipe: Recipe, *, device: str = "cpu", dtype: str | None = None
) -> str:
    """Return a SHA-256 (hex) of weights, tokenizer, recipe, data, and how it is computed.

    Args:
        device: that computes; only its type counts (``cuda:1`` gives the same as ``cuda``).
        dtype: of the source model in memory; None for float32.

    Raises:
        RecipeError: there is no such dtype.
        CheckpointError: a file cannot be read.
    """
    folder = source.folder
    payload = {
        "algorithm": ALGORITHM_VERSION,
        "weights": source.weights_sha256,
        # What generation stops at goes along with the tokenizer, and into the result.
        "tokenizer": _digests(
            source, folder, [*tokenizer_files(folder), *folder.glob("generation_config.json")]
        ),
        "recipe": recipe.content_hash(),
        "calibration": _data_identity(recipe.calibration, source),
        "training": _data_identity(recipe.training.data, source),
        "device": device.partition(":")[0],
        "dtype": dtype_name(dtype),
    }
    recovery = recovery_data(recipe)
    if recovery is not None:
        payload["recovery"] = _data_identity(recovery, source)
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def _data_identity(spec: CalibrationSpec, source: SourceModel) -> str | dict[str, str]:
    """Content of a local source, name of a remote one; read without tokenising anything."""
    path = local_path(spec.source, source.folder)
    if path is None or not path.exists():  # on the hub; or not there, as its reader will say
        return spec.source
    if path.is_dir():
        return _digests(source, path, sorted(p for p in path.rglob("*") if p.is_file()))
    return _digests(source, path.parent, [path])


def _digests(source: SourceModel, root: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 (hex) of files, by path below ``root``."""
    return {path.relative_to(root).as_posix(): source.file_sha256(path) for path in paths}
