"""Which files of a model's folder decide how text becomes tokens."""

from __future__ import annotations

from pathlib import Path

__all__ = ["TOKENIZER_FILES", "VOCABULARY_FILES", "tokenizer_files"]

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
)
"""Patterns relative to the folder; ``*.model`` are those of SentencePiece."""

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""A folder with a tokenizer has at least one of these; all match :data:`TOKENIZER_FILES`."""


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of ``folder`` that match, sorted."""
    found = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())
