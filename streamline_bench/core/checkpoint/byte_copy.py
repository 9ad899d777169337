"""Copies byte ranges between files in bounded memory.

Tensors change their place within a page when layers before them go. ``copy_file_range`` and
``sendfile`` then work on fragments of pages, which took about half as long again on ext4 in small
trials; writing from a mapping avoids that. Figures vary with the machine's load and with the file
system (tmpfs favours the kernel's copy): see tests/benchmarks/surgery_vs_copy.py.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

__all__ = ["copy_range"]

_STEP = 1 << 25  # bytes mapped at a time: all the memory that this takes
_PIECE = 1 << 20


def copy_range(
    source: int, target: int, begin: int, end: int, advance: Callable[[int], object]
) -> int:
    """Append bytes ``[begin, end)`` of file descriptor ``source`` to ``target``.

    Args:
        source: descriptor open for reading; its position is not used.
        target: descriptor open for writing; bytes go to its position, which moves on.
        begin, end: byte range of the source.
        advance: called with the number of bytes after each piece.

    Returns:
        The number of bytes copied; less than asked for if the source ends early.

    Raises:
        OSError: reading or writing failed.
    """
    end = min(end, os.fstat(source).st_size)
    position = begin
    while position < end:
        count = min(end - position, _STEP)
        _write_mapped(source, target, position, count)
        position += count
        advance(count)
    return max(position - begin, 0)


def _write_mapped(source: int, target: int, position: int, count: int) -> None:
    skipped = position % mmap.ALLOCATIONGRANULARITY  # where a mapping can begin
    length = skipped + count
    with (
        mmap.mmap(source, length, access=mmap.ACCESS_READ, offset=position - skipped) as window,
        memoryview(window) as view,
    ):
        done = skipped
        while done < length:
            with view[done : min(done + _PIECE, length)] as piece:
                done += os.write(target, piece)
