"""streamline.json, and the files it vouches for."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamline_bench.core.checkpoint.folder import (
    Manifest,
    hash_files,
    read_manifest,
    verify_files,
    write_manifest,
)
from streamline_bench.errors import (
    CheckpointError,
)


def manifest(folder: Path) -> Manifest:
    return Manifest(
        source={"name": "m", "weights_sha256": "0" * 64},
        recipe={"name": "r"},
        parameters_before=10,
        parameters_after=8,
        layers_before=6,
        layers_after=4,
        sparsity_requested=0.25,
        sparsity_reached=0.2,
        files=hash_files(folder),
    )


def test_manifest_round_trip(folder: Path) -> None:
    assert read_manifest(folder) is None
    written = manifest(folder)
    write_manifest(folder, written)
    assert read_manifest(folder) == written
    assert "streamline.json" not in hash_files(folder)
    verify_files(folder, written)


def test_changed_and_missing_files_are_named(folder: Path) -> None:
    written = manifest(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json was changed"):
        verify_files(folder, written)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is missing"):
        verify_files(folder, written)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"schema_version": 99}', "newer than 1; upgrade"),
        ("{}", "'source': Field required"),
        ("[]", "streamline.json"),
    ],
)
def test_damaged_manifest(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "streamline.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)
