"""The name of a compressed checkpoint in the cache: a hash of all that decides its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from streamline_bench.core.checkpoint.folder import tokenizer_files
from streamline_bench.core.checkpoint.manifest import file_sha256
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.corpora import local_path
from streamline_bench.core.recipe.schema import CalibrationSpec, Recipe
from streamline_bench.errors import CheckpointError
from streamline_bench.methods.recovery.recover import recovery_data
from streamline_bench.modeling.loading import dtype_name

__all__ = ["content_key"]

ALGORITHM_VERSION = 3
"""Part of every key; raised when the same recipe would give other weights."""


def content_key(
    folder: Path, recipe: Recipe, *, device: str = "cpu", dtype: str | None = None
) -> str:
    """Return a SHA-256 (hex) of weights, tokenizer, recipe, data, and how it is computed.

    Args:
        device: that computes; only its type counts (``cuda:1`` gives the same as ``cuda``).
        dtype: of the source model in memory; None for float32.

    Raises:
        RecipeError: there is no such dtype.
        CheckpointError: a file cannot be read.
    """
    payload = {
        "algorithm": ALGORITHM_VERSION,
        "weights": CheckpointReader(folder).fingerprint(),
        # What generation stops at goes along with the tokenizer, and into the result.
        "tokenizer": _digests(
            folder, [*tokenizer_files(folder), *folder.glob("generation_config.json")]
        ),
        "recipe": recipe.content_hash(),
        "calibration": _data_identity(recipe.calibration, folder),
        "training": _data_identity(recipe.training.data, folder),
        "device": device.partition(":")[0],
        "dtype": dtype_name(dtype),
    }
    recovery = recovery_data(recipe)
    if recovery is not None:
        payload["recovery"] = _data_identity(recovery, folder)
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def _data_identity(spec: CalibrationSpec, folder: Path) -> str | dict[str, str]:
    """Content of a local source, name of a remote one; read without tokenising anything."""
    path = local_path(spec.source, folder)
    if path is None or not path.exists():  # on the hub; or not there, as its reader will say
        return spec.source
    if path.is_dir():
        return _digests(path, sorted(p for p in path.rglob("*") if p.is_file()))
    return _digests(path.parent, [path])


def _digests(root: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 (hex) of files, by path below ``root``."""
    found = {}
    for path in paths:
        try:
            found[path.relative_to(root).as_posix()] = file_sha256(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from None
    return found
