"""Files: written whole or not at all, locked while in use, read by their schema.

An output appears whole or not at all, also after ``kill -9``. It is written under a hidden name
next to its target (same file system), synced to disk and renamed.
What a killed process leaves is hidden and named after its machine and process id; the next writer
to the same place on that machine removes it once that process is gone. On a shared file system it
may as well be at work on another machine (or in another container), where nobody here can see it:
such a leftover is removed when nothing in it has changed for a week.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from streamline_bench.core.recipe.validation import first_problem
from streamline_bench.errors import OutputError, RecipeError, StreamlineBenchError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"

Model = TypeVar("Model", bound=BaseModel)

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
            # Fails, rightly, where another process has made a folder with content meanwhile.
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


PATIENCE = 24 * 3600
"""Seconds to wait for what another process makes."""


@contextmanager
def awaited_lock(path: Path, waiting_for: str, *, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the lock of something that takes long to make, and that one process makes for all.

    Args:
        path: of the lock file, whose folder is made if it is missing.
        waiting_for, patience: as for :func:`file_lock`, which says what is raised.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LockUnwritable(str(error.strerror or error)) from None
    with file_lock(path, patience=patience, waiting_for=waiting_for):
        yield


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


def read_json(path: Path, error: type[StreamlineBenchError], advice: str) -> Any:
    """Return what a file holds.

    Args:
        error: what to raise.
        advice: what to do then: ``make the report again``.

    Raises:
        StreamlineBenchError: ``error``, where the file is missing or is not JSON.
    """
    try:
        # Unlike json, it refuses half a surrogate pair and nesting without end.
        return from_json(path.read_bytes())
    except (OSError, ValueError) as failure:
        raise error(f"{path} cannot be read ({failure}); {advice}.") from None


def validated(
    model: type[Model],
    payload: Any,
    origin: str,
    *,
    newest: int,
    error: type[StreamlineBenchError],
    advice: str,
) -> Model:
    """Return what a file holds as a model.

    Args:
        origin: the file, for the message.
        newest: the highest ``schema_version`` that is known.
        error, advice: as for :func:`read_json`.

    Raises:
        StreamlineBenchError: ``error``, where the version is newer or the content does not follow
            the schema; the first problem is named.
    """
    version = payload.get("schema_version") if isinstance(payload, dict) else None
    if isinstance(version, int) and version > newest:
        raise error(
            f"{origin} has schema version {version}, newer than {newest}; upgrade streamline-bench."
        )
    try:
        return model.model_validate(payload)
    except ValidationError as failure:
        raise error(f"{origin}: {first_problem(failure)}; {advice}.") from None


class _NoTwins(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping: of its two values the last would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in own if key != "<<" and own.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"'{twice}' stands twice in one mapping; remove one"
            )
        return super().construct_mapping(node, deep)


def read_yaml_mapping(path: Path, expected: str) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Args:
        expected: what the file is and must hold, for the message if it holds something else
            (``a plan: it must hold a mapping such as 'tasks: [piqa]'``).

    Raises:
        RecipeError: it cannot be read, is not YAML or holds no mapping.
    """
    try:
        payload = yaml.load(path.read_text(encoding="utf-8"), _NoTwins)  # noqa: S506: it is safe
        json.dumps(payload, default=str, skipkeys=True)  # fails if a list holds itself
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(
            f"{path} cannot be read as YAML ({' '.join(str(error).split())})."
        ) from None
    if not isinstance(payload, dict):
        raise RecipeError(f"{path} is not {expected}.")
    return payload
