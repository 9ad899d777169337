"""One run at a time in a folder: a lock that the system frees when its process ends, however."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.errors import OutputError

__all__ = ["LOCK_FILE", "check_usable", "lock_folder"]

LOCK_FILE = ".lock"


def check_usable(folder: Path, claim: str, what: str) -> None:
    """Refuse a folder that holds something else than a run; it need not be there yet.

    Args:
        claim: the file that a run writes first.
        what: what the folder should be, for the reader.

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
            f"{folder} exists and is no {what} (it has no {claim}); give another --output."
        )


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is missing.

    Raises:
        OutputError: another run holds it (which one, is said), or it cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE, timeout=0)
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"Another run is at work in {folder}{_holder(folder)}; wait for it, or give another "
            "--output."
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{folder} cannot be written ({reason}); give another --output."
        ) from None
    try:
        _note_holder(folder)
        yield
    finally:
        lock.release()


def _note_holder(folder: Path) -> None:
    holder = f"process {os.getpid()} on {platform.node()}\n"
    atomic_write_text(folder / f"{LOCK_FILE}.holder", holder)


def _holder(folder: Path) -> str:
    try:
        text = (folder / f"{LOCK_FILE}.holder").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return f" ({text})"
