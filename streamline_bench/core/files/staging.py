"""Atomic output: a file or folder appears whole or not at all, also after ``kill -9``.

It is written under a hidden name next to its target (same file system), synced to disk and renamed.
What a killed process leaves is hidden and named after its machine and process id; the next writer
to the same place on that machine removes it once that process is gone. On a shared file system it
may as well be at work on another machine (or in another container), where nobody here can see it:
such a leftover is removed when nothing in it has changed for a week.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from streamline_bench.errors import OutputError

_FOREIGN_AGE = 7 * 24 * 3600
"""Seconds; a compression opens its output before it trains, and may leave it alone for days."""


@contextmanager
def staged_output(output: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``output`` when the block ends without an exception.

    With ``overwrite`` the old folder stays until the new one is whole: the two are swapped in one
    step where the system can (Linux). Elsewhere the old one is moved aside for the instant between
    two renames; should the process be killed right there, the next writer puts it back.

    Raises:
        OutputError: ``output`` exists (and ``overwrite`` is false) or cannot be written.
    """
    output = Path(output).absolute()
    _settle_leftovers(output)
    _check_free(output, overwrite)
    staging = _hidden(output, "partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise _unwritable(output, error) from error
    try:
        yield staging
        _sync_tree(staging)
        _publish(staging, output, overwrite)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never a part of it.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path).absolute()
    _settle_leftovers(path)
    staging = _hidden(path, "partial")
    try:
        with staging.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
        sync_path(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):  # which would hide why nothing could be written
            staging.unlink()


def atomic_write_text(path: Path | str, data: str) -> None:
    """Write UTF-8 text as :func:`atomic_write_bytes` does."""
    atomic_write_bytes(path, data.encode())


def sync_path(path: Path) -> None:
    """Flush one file or folder to disk, so that a rename after it cannot overtake the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_free(output: Path, overwrite: bool) -> None:
    if os.path.lexists(output) and not overwrite:
        raise OutputError(
            f"Output {output} exists; give another --output or pass --overwrite to replace it."
        )
    if os.path.lexists(output) and (output.is_symlink() or not output.is_dir()):
        raise OutputError(f"Output {output} is not a folder; give another --output.")


def _hidden(target: Path, kind: str) -> Path:
    process = f"{_machine()}-{os.getpid()}"
    return target.parent / f".{target.name}.{kind}-{process}-{secrets.token_hex(4)}"


def _unwritable(output: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"Output {output} cannot be written ({reason}); give another --output.")


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            sync_path(Path(root, name))
        sync_path(Path(root))


def _publish(staging: Path, output: Path, overwrite: bool) -> None:
    try:
        if overwrite and output.is_dir():
            _replace(staging, output)
        else:
            # Fails where another process has made a folder with content meanwhile, as it should.
            staging.rename(output)
        sync_path(output.parent)
    except OSError as error:
        raise _unwritable(output, error) from error


def _replace(staging: Path, output: Path) -> None:
    if _exchange(staging, output):
        shutil.rmtree(staging, ignore_errors=True)
        return
    aside = _hidden(output, "replaced")
    output.rename(aside)
    try:
        staging.rename(output)
    except OSError:
        aside.rename(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; False where the system or file system cannot."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(swap(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def _settle_leftovers(output: Path) -> None:
    # Names of earlier versions lack the machine.
    pattern = re.compile(
        re.escape(f".{output.name}.") + r"(partial|replaced)-(?:([0-9a-f]{12})-)?(\d+)-[0-9a-f]{8}"
    )
    try:
        names = [path.name for path in output.parent.iterdir()]
    except OSError:
        return  # absent or unreadable: writing there will say so
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        leftover = output.parent / name
        ours = match[2] == _machine()
        if not _alive(int(match[3])) if ours else _age(leftover) > _FOREIGN_AGE:
            _settle(leftover, match[1], output)


def _settle(leftover: Path, kind: str, output: Path) -> None:
    with suppress(OSError):  # another writer was faster, or it is not ours: it may stay
        # Killed between the two renames of an overwrite: the old folder is whole, put it back.
        if kind == "replaced" and not os.path.lexists(output):
            leftover.rename(output)
        elif leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # someone else's process
    return True


@functools.cache
def _machine() -> str:
    """Name where process ids mean the same: one machine since it was started, one container."""
    known = [platform.node()]
    with suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with suppress(OSError):
        known.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return hashlib.sha256(" ".join(known).encode()).hexdigest()[:12]


def _age(path: Path) -> float:
    """Seconds since anything in it changed; none if it is gone or cannot be read."""
    try:
        newest = max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    except OSError:
        return 0.0
    return time.time() - newest
