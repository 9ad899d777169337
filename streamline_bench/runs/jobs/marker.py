"""What a job leaves behind: ``done.json``, written last, or ``failed.json``.

``done.json`` lists every file the job made, with its size and (below 64 MB) its SHA-256, so that a
result that was truncated or changed later is not taken for whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from streamline_bench.core.checkpoint.manifest import file_sha256
from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.errors import OutputError
from streamline_bench.runs.folder import job_folder

__all__ = [
    "Done",
    "Failed",
    "count_attempt",
    "forget_failure",
    "read_done",
    "read_failed",
    "write_done",
    "write_failed",
]

_HASHED_UP_TO = 64 << 20


class FileMark(NamedTuple):
    """Size in bytes and SHA-256 (hex; None for large files, whose manifests have it)."""

    size: int
    sha256: str | None


class Done(Frozen):
    """A finished job.

    Attributes:
        key: content key of the job that was asked; another key means another result.
        seconds: wall-clock seconds of the attempt that succeeded.
        attempts: how often the job was started.
        command: what a reader can type to repeat it, where there is such a command.
        files: path relative to the run folder -> mark.
        facts: what the job has to say about its result.
    """

    schema_version: Literal[1] = 1
    key: str
    seconds: float = Field(ge=0)
    attempts: int = Field(ge=1)
    command: str | None = None
    files: dict[str, FileMark]
    facts: dict[str, Any] = Field(default_factory=dict)


class Failed(Frozen):
    """Why an attempt failed, in a sentence."""

    schema_version: Literal[1] = 1
    key: str
    reason: str
    attempts: int


def read_done(run: Path, name: str, key: str) -> Done | None:
    """Return the marker of a job whose result is there and whole, else None."""
    try:
        text = (job_folder(run, name) / "done.json").read_text(encoding="utf-8")
        done = Done.model_validate_json(text)
    except (OSError, UnicodeDecodeError, ValidationError):
        return None  # not finished, damaged, or of another release: the job is done again
    if done.key != key or not all(_is_whole(run / path, m) for path, m in done.files.items()):
        return None
    return done


def write_done(
    run: Path,
    name: str,
    *,
    key: str,
    seconds: float,
    products: list[str],
    command: str | None = None,
    facts: dict[str, Any] | None = None,
) -> Done:
    """Write the marker of a finished job and remove that of an earlier failure.

    Args:
        products: files and folders it made, relative to the run folder.

    Raises:
        OutputError: the job's folder cannot be written.
    """
    files = {
        path.relative_to(run).as_posix(): _mark(path)
        for product in products
        for path in _files(run / product)
    }
    done = Done(
        key=key,
        seconds=round(max(0.0, seconds), 3),
        attempts=max(1, _attempts(run, name)),
        command=command,
        files=files,
        facts=facts or {},
    )
    folder = job_folder(run, name)
    atomic_write_text(folder / "done.json", done.model_dump_json(indent=2) + "\n")
    forget_failure(run, name)
    return done


def write_failed(run: Path, name: str, *, key: str, reason: str) -> None:
    """Note why a job failed.

    Raises:
        OutputError: the job's folder cannot be written.
    """
    failed = Failed(key=key, reason=reason, attempts=_attempts(run, name))
    text = failed.model_dump_json(indent=2) + "\n"
    atomic_write_text(job_folder(run, name) / "failed.json", text)


def read_failed(run: Path, name: str, key: str) -> Failed | None:
    """Return why this job's last attempt failed, None if it did not say."""
    try:
        text = (job_folder(run, name) / "failed.json").read_text(encoding="utf-8")
        failed = Failed.model_validate_json(text)
    except (OSError, UnicodeDecodeError, ValidationError):
        return None
    return failed if failed.key == key else None


def forget_failure(run: Path, name: str) -> None:
    """Remove the note of an earlier failure, which a process that says nothing would inherit.

    Raises:
        OutputError: it cannot be removed.
    """
    path = job_folder(run, name) / "failed.json"
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be removed ({error.strerror}).") from None


def count_attempt(run: Path, name: str) -> int:
    """Count one more attempt of a job, before it does anything; return its number from 1."""
    number = _attempts(run, name) + 1
    atomic_write_text(job_folder(run, name) / "attempts.json", json.dumps(number) + "\n")
    return number


def _attempts(run: Path, name: str) -> int:
    try:
        number = json.loads((job_folder(run, name) / "attempts.json").read_text("utf-8"))
    except (OSError, ValueError):
        return 0
    return number if isinstance(number, int) and number > 0 else 0


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def _mark(path: Path) -> FileMark:
    size = path.stat().st_size
    return FileMark(size, file_sha256(path) if size <= _HASHED_UP_TO else None)


def _is_whole(path: Path, mark: FileMark) -> bool:
    try:
        if path.stat().st_size != mark.size:
            return False
        return mark.sha256 is None or file_sha256(path) == mark.sha256
    except OSError:
        return False
