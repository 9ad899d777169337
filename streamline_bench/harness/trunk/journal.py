"""Answers of one model in a file, batch by batch, so that a killed walk can continue.

Every line holds the answers of one batch and their checksum. What a kill leaves half written, or a
disk damaged, ends at the last whole line before it; what is missing is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamline_bench.errors import OutputError
from streamline_bench.harness.scoring.packing import Query
from streamline_bench.harness.scoring.scorer import Answer

_EVERY = 2.0
"""Seconds after which answers are written, so that quick batches do not wait for the disk."""


def name_of(queries: Sequence[Query], *batching: object) -> str:
    """Name queries and how they are batched: in other batches, the last digits may be others."""
    sums = hashlib.sha256(repr(batching).encode())
    for query in queries:
        head = [query.index, len(query.inputs), len(query.targets)]
        for numbers in (head, query.inputs, query.targets):
            sums.update(np.asarray(numbers, dtype=np.int64).tobytes())
    return sums.hexdigest()[:16]


class Journal:
    """The answers of one model.

    Args:
        path: of the file; what it holds already is taken up.
        every: seconds between two writes.

    Raises:
        OutputError: the file cannot be read or written.
    """

    def __init__(self, path: Path, *, every: float = _EVERY) -> None:
        self._path = path
        self._every = every
        self._answers: dict[str, dict[int, Answer]] = {}
        self._waiting: list[str] = []
        self._written = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = self._read()
            if path.exists():
                os.truncate(path, whole)
        except OSError as error:
            raise self._unusable(error) from None

    def known(self, asked: str) -> dict[int, Answer]:
        """Return the answers to queries of that name, by their index."""
        return dict(self._answers.get(asked, {}))

    def add(self, asked: str, answers: Iterable[tuple[int, Answer]]) -> None:
        """Keep answers; they are in the file some seconds later, or after :meth:`write`.

        Raises:
            OutputError: the file cannot be written.
        """
        kept = [[index, *answer] for index, answer in answers]
        if not kept:
            return
        self._waiting.append(_line([asked, kept]))
        if time.monotonic() - self._written >= self._every:
            self.write()

    def write(self) -> None:
        """Write what waits.

        Raises:
            OutputError: the file cannot be written.
        """
        text, self._waiting = "".join(self._waiting), []
        self._written = time.monotonic()
        if not text:
            return
        try:
            with self._path.open("ab") as file:
                file.write(text.encode())
        except OSError as error:
            raise self._unusable(error) from None

    def discard(self) -> None:
        """Remove the file: the answers are elsewhere by now, or will never be asked for."""
        self._waiting = []
        self._path.unlink(missing_ok=True)

    def _read(self) -> int:
        """Take up the lines that are whole; return how many bytes they have."""
        size = 0
        data = self._path.read_bytes() if self._path.exists() else b""
        for line in data.splitlines(keepends=True):
            batch = _batch(line)
            if batch is None:
                break
            asked, answers = batch
            known = self._answers.setdefault(asked, {})
            known.update({index: (score, greedy) for index, score, greedy in answers})
            size += len(line)
        return size

    def _unusable(self, error: OSError) -> OutputError:
        return OutputError(
            f"Answers cannot be kept in {self._path} ({error.strerror}); free some space or give "
            "another output."
        )


def _line(batch: list[Any]) -> str:
    text = json.dumps(batch)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _batch(line: bytes) -> Any:
    sums, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or sums != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)
