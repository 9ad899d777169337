"""Reads calibration documents from local files, one record at a time.

* ``.txt``: documents are separated by NUL characters if the first mebibyte holds one, else by
  blank lines (lines of white space only).
* ``.jsonl`` (or ``.json`` with one object per line): one record per line.
* ``.parquet``: one record per row, read in batches.

Text and jsonl files may be compressed (``.gz``, ``.xz``, ``.bz2``).
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from streamline_bench.errors import CalibrationError

__all__ = ["FILE_SUFFIXES", "file_kind", "read_file", "record_field"]

FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")
_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSED: Mapping[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_PIECE = 1 << 20
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")


def file_kind(source: str | Path) -> str:
    """Return ``text``, ``jsonl`` or ``parquet`` by the name's ending, or an empty string."""
    path = Path(source)
    suffix = Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    kind = _KINDS.get(suffix, "")
    return "" if kind == "parquet" and path.suffix in _COMPRESSED else kind


def read_file(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the records of a file; those of a text file are ``{"text": document}``.

    Raises:
        CalibrationError: the file is damaged or a line is not a JSON object (its number is named).
    """
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    try:
        yield from readers[file_kind(path)](path)
    except UnicodeDecodeError:
        raise CalibrationError(
            f"Calibration file {path} is not UTF-8 text; convert it to UTF-8."
        ) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CalibrationError(
            f"Calibration file {path} cannot be read ({error}); check it and its compression."
        ) from error


def record_field(record: Mapping[str, Any], field: str, source: str) -> Any:
    """Return a field of a record; dots reach into nested records (``meta.set_name``).

    Raises:
        CalibrationError: there is no such field; those that exist are named.
    """
    if field in record:
        return record[field]
    value: Any = record
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            there = ", ".join(sorted(map(str, record))) or "no fields"
            raise CalibrationError(
                f"Calibration source {source} has no field '{field}'; it has {there}."
            )
        value = value[part]
    return value


def _open(path: Path) -> TextIO:
    opener = _COMPRESSED.get(path.suffix)
    if opener is None:
        return path.open(encoding="utf-8")
    stream: TextIO = opener(path, "rt", encoding="utf-8")
    return stream


def _read_text(path: Path) -> Iterator[Mapping[str, Any]]:
    with _open(path) as stream:
        text = stream.read(_PIECE)
        separator = re.compile("\0+") if "\0" in text else _BLANK_LINE
        while piece := stream.read(_PIECE):
            *whole, text = separator.split(text + piece)
            yield from ({"text": document} for document in whole if document.strip())
        yield from ({"text": part} for part in separator.split(text) if part.strip())


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(
                    f"Line {number} of calibration file {path} is not JSON ({error.msg}); mend or "
                    "remove it."
                ) from None
            if not isinstance(record, dict):
                raise CalibrationError(
                    f"Line {number} of calibration file {path} is not a JSON object; each line "
                    'must look like {"text": "..."}.'
                )
            yield record


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise CalibrationError(
            f"Calibration file {path} is not a whole parquet file ({error}); write it again."
        ) from None
