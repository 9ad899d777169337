"""Locks that the system frees when their process ends, however; one run at a time in a folder."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.errors import OutputError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"


def check_usable(folder: Path, claim: str, what: str) -> None:
    """Refuse a folder that holds something other than a run; it may be missing.

    Args:
        claim: the file that a run writes first.
        what: what the folder should be, for the message: ``a run folder``.

    Raises:
        OutputError: it is a file, cannot be read, or holds something without that file.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is not a folder; give another --output.")
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be read ({error.strerror}); give another --output."
        ) from None
    # A run that was killed before its claim was written leaves only hidden files.
    if claim not in names and any(not name.startswith(".") for name in names):
        raise OutputError(
            f"{folder} exists and is not {what} (it has no {claim}); give another --output."
        )


class LockHeld(Exception):  # noqa: N818 - callers say what it means
    """Another process holds the lock."""


class LockUnwritable(Exception):  # noqa: N818 - callers say what it means
    """The lock's file cannot be written, for ``reason``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@contextmanager
def file_lock(path: Path, *, patience: float = 0, waiting_for: str = "") -> Iterator[None]:
    """Hold a lock file; the system frees it when its process ends, however.

    Args:
        patience: seconds to wait for another process that holds it.
        waiting_for: what that process does, for the log.

    Raises:
        LockHeld: another process holds it, for longer than that.
        LockUnwritable: the file cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if patience:
                log.info("waiting for another process that %s (%s)", waiting_for, path)
            lock.acquire(timeout=patience)
    except Timeout:
        raise LockHeld from None
    except (OSError, NotImplementedError) as error:
        raise LockUnwritable(str(getattr(error, "strerror", None) or error)) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is missing.

    Raises:
        OutputError: another run holds it (the message says which), or it cannot be written.
    """
    with suppress(OSError):  # the lock's file then says why
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with file_lock(folder / LOCK_FILE):
            _note_holder(folder)
            yield
    except LockHeld:
        raise OutputError(
            f"Another run is at work in {folder}{_holder(folder)}; wait for it, or give another "
            "--output."
        ) from None
    except LockUnwritable as error:
        raise OutputError(
            f"{folder} cannot be written ({error.reason}); give another --output."
        ) from None


def _note_holder(folder: Path) -> None:
    holder = f"process {os.getpid()} on {platform.node()}\n"
    atomic_write_text(folder / f"{LOCK_FILE}.holder", holder)


def _holder(folder: Path) -> str:
    try:
        text = (folder / f"{LOCK_FILE}.holder").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return f" ({text})"
