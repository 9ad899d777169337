"""Copies byte ranges between files as fast as whole files, in bounded memory."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable

__all__ = ["copy_range"]

_STEP = 1 << 25  # bytes per round: bounds the memory mapped at a time, and paces the progress bar
_PIECE = 1 << 20
_PAGE = 4096
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
    # Where a byte changes its place within a page, the kernel's own copy works on fragments of
    # pages and takes half as long again; writing from a mapping does not.
    in_place = (os.lseek(target, 0, os.SEEK_CUR) - begin) % _PAGE == 0
    position = begin
    for move in (_in_kernel, _from_mapping) if in_place else (_from_mapping,):
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


def _from_mapping(source: int, target: int, position: int, count: int) -> int:
    count = min(count, os.fstat(source).st_size - position)
    if count <= 0:
        return 0
    skipped = position % mmap.ALLOCATIONGRANULARITY
    length = skipped + count
    with (
        mmap.mmap(source, length, access=mmap.ACCESS_READ, offset=position - skipped) as window,
        memoryview(window) as view,
    ):
        done = skipped
        while done < length:
            with view[done : min(done + _PIECE, length)] as piece:
                done += os.write(target, piece)
    return count
