"""``streamline.json``: what a checkpoint is; written last, so that it vouches for the rest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field

from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.core.files.structured import read_json, validated
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.errors import CheckpointError

MANIFEST_NAME = "streamline.json"
SCHEMA_VERSION = 1


class Source(Frozen):
    """The model that was compressed."""

    name: str
    revision: str | None = None
    weights_sha256: str


class Manifest(Frozen):
    """Where a checkpoint comes from and what was done to it.

    ``method`` says who wrote the method and in which version;
    ``chosen`` holds what the method decided (block, similarities); ``files`` the SHA-256 of every
    other file in the folder, by name; ``seconds`` wall time by stage. Sparsities are shares of all
    parameters, embeddings included, of the source model.
    """

    schema_version: int = SCHEMA_VERSION
    source: Source
    recipe: dict[str, Any]
    method: dict[str, Any] = Field(default_factory=dict)
    chosen: dict[str, Any] = Field(default_factory=dict)
    parameters_before: int
    parameters_after: int
    layers_before: int
    layers_after: int
    sparsity_requested: float | None = None
    sparsity_reached: float
    calibration: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] | None = None
    seed: int = 0
    versions: dict[str, str] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``streamline.json``; call it after every other file of ``folder`` is there.

    Raises:
        OutputError: the file cannot be written.
    """
    payload = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True)
    atomic_write_text(Path(folder) / MANIFEST_NAME, payload + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder, or None if it has none (it is not one of ours).

    Raises:
        CheckpointError: there is one, and it is damaged or of a newer schema.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.exists():
        return None
    return validated(
        Manifest, read_json(path, CheckpointError, "compress again"), str(path),
        newest=SCHEMA_VERSION, error=CheckpointError, advice="compress again",
    )  # fmt: skip


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 (hex) of every file in ``folder`` but the manifest, by relative path."""
    folder = Path(folder)
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Check every file the manifest names against its SHA-256.

    Raises:
        CheckpointError: one is missing or differs; the message names it.
    """
    for name, expected in manifest.files.items():
        path = Path(folder) / name
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing from a compressed checkpoint; compress again."
            )
        if file_sha256(path) != expected:
            raise CheckpointError(
                f"{path} was changed after compression (its SHA-256 differs from "
                f"{MANIFEST_NAME}); compress again."
            )


def update_digest(digest: hashlib._Hash, path: Path) -> None:
    """Feed a file to a digest, a few megabytes at a time."""
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    update_digest(digest, path)
    return digest.hexdigest()
