"""Reads documents from local files, one record at a time.

* ``.txt``: documents are separated by NUL characters if the first mebibyte holds one, else by
  blank lines (lines of white space only).
* ``.jsonl``, ``.ndjson``, ``.json``: one JSON object or string per line, or one array of them.
* ``.csv``, ``.tsv``: one record per row, its fields named in the first one.
* ``.parquet``: one record per row, read in batches.

All but parquet files may be compressed (``.gz``, ``.xz``, ``.bz2``, ``.zst``) and begin with a
byte-order mark. Halves of surrogate pairs, which no tokenizer takes, become U+FFFD.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from streamline_bench.core.data.leading_tokens import leading_tokens, name_of
from streamline_bench.errors import CalibrationError, first_line, library_errors

log = logging.getLogger(__name__)

FILE_KINDS = ".txt, .jsonl, .json, .csv, .tsv or .parquet (also .gz, .xz, .bz2, .zst)"
_KINDS = {
    ".txt": "text", ".text": "text",
    ".jsonl": "json", ".ndjson": "json", ".json": "json",
    ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
_COMPRESSED = {".gz": "gzip", ".xz": "lzma", ".bz2": "bz2", ".zst": "zstd"}
_PIECE = 1 << 20
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}
"""What ShareGPT calls the speakers, in the words of chat templates."""


def file_kind(source: str | Path) -> str:
    """Return text, json, csv, tsv or parquet by the name's ending, or an empty string."""
    path = Path(source)
    compressed = path.suffix.lower() in _COMPRESSED
    kind = _KINDS.get((Path(path.stem).suffix if compressed else path.suffix).lower(), "")
    return "" if kind == "parquet" and compressed else kind


def read_file(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the records of a file; those of a text file are ``{"text": document}``.

    Raises:
        CalibrationError: the file is missing, of another kind or damaged, or holds something else
            than records (the line is named).
    """
    if path.is_dir():
        raise CalibrationError(
            f"{path} is a folder where a file is needed; give a {FILE_KINDS} file (a calibration "
            "folder is read only as the one source)."
        )
    if not path.is_file():
        raise CalibrationError(f"The file {path} does not exist; give a {FILE_KINDS} file.")
    kind = file_kind(path)
    if not kind:
        raise CalibrationError(f"{path} {_what_it_is(path)}; give a {FILE_KINDS} file.")
    readers: Mapping[str, Callable[[Path], Iterator[Mapping[str, Any]]]] = {
        "text": _read_text,
        "json": _read_json,
        "csv": lambda path: _read_table(path, ","),
        "tsv": lambda path: _read_table(path, "\t"),
        "parquet": _read_parquet,
    }
    records = readers[kind](path)
    while True:
        with library_errors(
            f"The file {path} cannot be read", "check it and its compression", CalibrationError
        ):
            try:
                record = next(records, None)
            except UnicodeDecodeError:
                raise CalibrationError(
                    f"The file {path} is not UTF-8 text; convert it to UTF-8."
                ) from None
        if record is None:
            return
        yield record


OF_CALIBRATION = (
    "name the field that holds the text: --set calibration.text_field=NAME (scan: --text-field)"
)
OF_TEXTS = "name the field that holds the text: --text-field NAME"
"""Remedies for a record whose text is in another field."""


def record_field(record: Mapping[str, Any], field: str, source: str, remedy: str) -> Any:
    """Return a field of a record; dots reach into nested records (``meta.set_name``).

    Raises:
        CalibrationError: there is no such field; those that exist are named.
    """
    if field in record:
        return record[field]
    value: Any = record
    for part in field.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            there = ", ".join(sorted(map(str, record))) or "no fields"
            raise CalibrationError(f"{source} has no field '{field}'; it has {there}; {remedy}.")
        value = value[part]
    return value


class NullTexts:
    """Counts the records of a source that are left out because something in them is null."""

    def __init__(self, source: str, why: str = "their text is null") -> None:
        self.source, self.why, self.count = source, why, 0

    def among(self, texts: Sequence[Any]) -> bool:
        """Count a record if one of its texts is null, and say whether it is."""
        null = any(text is None for text in texts)
        self.count += null
        return null

    def text(self, text: str | None) -> str:
        """Return the text; an empty one for null."""
        return "" if self.among([text]) else str(text)

    def warn(self) -> None:
        """Say how many there were, if any."""
        if self.count:
            records = "1 record" if self.count == 1 else f"{self.count} records"
            log.warning("%s of %s left out: %s", records, self.source, self.why)


def document_text(
    record: Mapping[str, Any],
    field: str,
    source: str,
    tokenizer: Any = None,
    remedy: str = OF_CALIBRATION,
) -> str | None:
    """Return the text of a record: a field of text, or a conversation as the model sees one.

    None where the field, or what one turn says, is null.

    Where the field is ``text`` and the record has none, its ``messages`` or ``conversations`` are
    taken. A conversation is a list of turns (``role`` and ``content``, or ``from`` and ``value``),
    written with the tokenizer's chat template.

    Args:
        remedy: what names another field.

    Raises:
        CalibrationError: there is no such field, it holds something else, or the tokenizer has no
            chat template.
    """
    if field == "text" and field not in record:
        field = next((each for each in ("messages", "conversations") if each in record), field)
    value = record_field(record, field, source, remedy)
    if value is None or isinstance(value, str):
        return value
    if not (isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)):
        raise CalibrationError(
            f"Field '{field}' of {source} holds {type(value).__name__}, not text or a "
            f"conversation; {remedy}."
        )
    return _conversation(value, field, source, tokenizer)


def _conversation(
    turns: list[dict[str, Any]], field: str, source: str, tokenizer: Any
) -> str | None:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"Field '{field}' of {source} holds conversations, and the model's tokenizer has no "
            "chat template to write them with; give a field of text."
        )
    messages = []
    for turn in turns:
        role, content = (_either(turn, *names) for names in (("role", "from"), _SAID))
        if content is None and any(name in turn for name in _SAID):
            return None
        if not isinstance(role, str) or not isinstance(content, str):
            keys = ", ".join(sorted(map(str, turn)))
            raise CalibrationError(
                f"A turn in '{field}' of {source} has the keys {keys}; "
                "it needs role and content (or from and value), both text."
            )
        messages.append({"role": _ROLES.get(role, role), "content": content})
    with library_errors(
        f"The chat template cannot write a conversation of {source}", kind=CalibrationError
    ):
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    # The template writes BOS itself, and the tokenizer would put a second one in front.
    leading = leading_tokens(tokenizer)
    return text.removeprefix(name_of(leading, tokenizer)) if leading else text


_SAID = ("content", "value")


def _either(turn: Mapping[str, Any], first: str, second: str) -> Any:
    """The value of the one of two keys that is not null."""
    value = turn.get(first)
    return turn.get(second) if value is None else value


def _what_it_is(path: Path) -> str:
    if path.suffix.lower() in _COMPRESSED:
        return f"is compressed ({path.suffix}), and its name does not say what is in it"
    return f"is a {path.suffix} file, which is not read" if path.suffix else "has no ending"


def _open(path: Path) -> TextIO:
    """Open for reading as UTF-8; a byte-order mark is skipped."""
    method = _COMPRESSED.get(path.suffix.lower())
    newline = "" if "sv" in file_kind(path) else None  # the csv module reads line ends itself
    if method is None:
        return path.open(encoding="utf-8-sig", newline=newline)
    raw: Any
    if method == "zstd":  # Python has no module for it before 3.14
        import pyarrow

        raw = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), "rb"), "zstd")
    else:
        raw = importlib.import_module(method).open(path, "rb")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline)


def _read_text(path: Path) -> Iterator[Mapping[str, Any]]:
    with _open(path) as stream:
        text = stream.read(_PIECE)
        separator = re.compile("\0+") if "\0" in text else _BLANK_LINE
        while piece := stream.read(_PIECE):
            *whole, text = separator.split(text + piece)
            yield from ({"text": document} for document in whole if document.strip())
        yield from ({"text": part} for part in separator.split(text) if part.strip())


def _read_json(path: Path) -> Iterator[Mapping[str, Any]]:
    with _open(path) as stream:
        first = next((line for line in stream if line.strip()), "")
    if first.lstrip().startswith("["):
        with _open(path) as stream:
            items = _parsed(stream.read(), f"The array in {path}", path)
        yield from (_record(item, f"Item {n} of {path}") for n, item in enumerate(items, start=1))
        return
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                place = f"Line {number} of {path}"
                yield _record(_parsed(line, place, path), place)


def _parsed(text: str, place: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        whole = " (a file with one JSON object over several lines is not read)"
        hint = whole if text.strip() == "{" else ""
        deep = isinstance(error, RecursionError)
        said = "nested too deeply" if deep else getattr(error, "msg", first_line(error))
        raise CalibrationError(
            f"{place} is not JSON ({said}){hint}; correct or remove it."
        ) from None


def _record(item: Any, place: str) -> Mapping[str, Any]:
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, dict):
        raise CalibrationError(
            f'{place} is not a JSON object or text; it must look like {{"text": "..."}}.'
        )
    sound = _sound(item)
    if sound != item:
        log.warning("%s holds half of a surrogate pair, which becomes U+FFFD.", place)
    return sound  # type: ignore[no-any-return]


def _sound(value: Any) -> Any:
    """Return a JSON value with lone surrogates replaced, whole pairs joined."""
    if isinstance(value, str):
        if not _SURROGATE.search(value):
            return value
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {_sound(key): _sound(each) for key, each in value.items()}
    return [_sound(each) for each in value] if isinstance(value, list) else value


def _read_table(path: Path, delimiter: str) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # documents are longer than the module expects
    with _open(path) as stream:
        rows = csv.reader(stream, delimiter=delimiter, strict=True)
        names = next(rows, [])
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise CalibrationError(
                f"The first line of {path} names '{twice}' twice, so that nobody can know which "
                "column is meant; rename one."
            )
        for row in rows:
            if row and len(row) != len(names):
                raise CalibrationError(
                    f"Line {rows.line_num} of {path} has {len(row)} fields, its first line names "
                    f"{len(names)}; correct it."
                )
            if row:
                yield dict(zip(names, row, strict=True))


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()
