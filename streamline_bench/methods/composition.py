"""Writes what a method hands back as a checkpoint folder, without its manifest."""

from __future__ import annotations

from pathlib import Path

from streamline_bench.core.checkpoint import CheckpointReader
from streamline_bench.core.staging import atomic_write_text
from streamline_bench.methods.base import Compressed

__all__ = ["write_compressed"]


def write_compressed(folder: Path, reader: CheckpointReader, result: Compressed) -> None:
    """Write weights, config, tokenizer and artefacts into an existing, empty folder.

    Args:
        reader: the checkpoint that ``result.names`` speaks of.

    Raises:
        CheckpointError: a named tensor is not in it.
        OutputError: the folder cannot be written.
    """
    from streamline_bench.core.shards import compose

    compose(reader, folder, config=dict(result.config), names=result.names, extra=result.tensors)
    for name, text in result.artefacts.items():
        atomic_write_text(folder / name, text)
