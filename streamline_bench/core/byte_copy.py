"""Copies byte ranges between files inside the kernel where it can, in bounded memory always."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

__all__ = ["copy_range"]

_STEP = 1 << 26  # bytes per system call: seldom enough to be cheap, often enough for progress
_BUFFER = 1 << 20  # larger ones fall out of the processor's cache between read and write
_UNSUPPORTED = {
    errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF,
    errno.ETXTBSY,
}  # fmt: skip


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
    position = begin
    for move in (_in_kernel, _through_memory):
        while position < end:
            moved = move(source, target, position, min(end - position, _STEP))
            if moved <= 0:
                break  # not supported here, or the end of the source: the next way tells which
            position += moved
            advance(moved)
    return position - begin


def _in_kernel(source: int, target: int, position: int, count: int) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, target, count, offset_src=position)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return 0
        raise


def _through_memory(source: int, target: int, position: int, count: int) -> int:
    data = os.pread(source, min(count, _BUFFER), position)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(target, rest) :]
    return len(data)
