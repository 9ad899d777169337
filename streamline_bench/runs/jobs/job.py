"""What every job of a comparison has, and what it leaves behind in its folder.

``job.json`` is the job itself. ``done.json``, written last, lists every file the job made, with its
size and (below 64 MB) its SHA-256, so that a result that was truncated or changed later is made
again. ``failed.json`` says why the last attempt failed.
"""

from __future__ import annotations

import json
import shlex
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from streamline_bench.core.checkpoint.folder import file_sha256
from streamline_bench.core.files import atomic_write_text
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.errors import OutputError
from streamline_bench.runs.folder import RunPaths

_HASHED_UP_TO = 64 << 20


class Facts(Frozen):
    """What a job has to say about its result.

    Attributes:
        together: labels of the rows that one walk scored, this one among them.
        alone: why the row was scored by itself.
        not_compared: task -> why it was not scored although it was asked for.
    """

    model_config = ConfigDict(extra="ignore")  # earlier versions wrote other facts

    together: tuple[str, ...] = ()
    alone: str | None = None
    not_compared: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What the work of a job gives in addition to its files."""

    command: str | None = None
    facts: Facts = field(default_factory=Facts)


class Job(Frozen):
    """One step of a comparison, done by a process of its own.

    A key covers everything that decides the result, through the keys of the jobs before it; where
    and with how many workers the job runs does not enter.

    Attributes:
        kind: tells the classes of jobs apart in ``job.json``.
        label: of the row that it works for; None: for no single one.
        row_folder: of the row in the run folder; None: its label.
        key: content key of the result.
        model: the dense model, or the checkpoint made elsewhere: folder (absolute) or hub id.
        environment: variables of its process.
        processes: that share its work, each with a GPU of its own, or GPUs that vLLM splits a model
            over.
    """

    kind: str
    label: str | None = None
    row_folder: str | None = None
    key: str
    model: str
    revision: str | None = None
    device: str
    trust_remote_code: bool = False
    environment: dict[str, str] = Field(default_factory=dict)
    processes: int = Field(default=1, ge=1)

    @property
    def name(self) -> str:
        """Unique in the run; the name of the job's folder."""
        return f"{self.kind}-{self.place}"

    @property
    def place(self) -> str:
        """Name of the row's folder."""
        return self.row_folder or self.label or ""

    @property
    def labels(self) -> tuple[str, ...]:
        """Rows that it works for; a failure is theirs."""
        return () if self.label is None else (self.label,)

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the jobs that must have succeeded."""
        return ()

    @property
    def parts(self) -> Sequence[Job]:
        """The jobs that its process does: itself, or several that are scored together."""
        return (self,)

    def source(self) -> Path:
        """Return the folder of the dense model (CheckpointError: it is not there)."""
        from streamline_bench.core.checkpoint.folder import resolve_pretrained

        return resolve_pretrained(self.model, self.revision)

    @abstractmethod
    def products(self, run: RunPaths) -> list[Path]:
        """Files and folders that it makes."""

    @abstractmethod
    def work(self, run: RunPaths) -> Result:
        """Make them (StreamlineBenchError: why it cannot be done)."""

    def write(self, run: RunPaths) -> None:
        """Write what the job's process reads (OutputError: the job's folder cannot be written)."""
        text = self.model_dump_json(indent=2) + "\n"
        atomic_write_text(run.make_job(self.name) / "job.json", text)


class Together(Job):
    """Several rows' jobs in one process, each of which is marked as done or failed by itself.

    Attributes:
        jobs: those of the rows; all ask the same.
    """

    jobs: tuple[Any, ...] = Field(min_length=2)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(job.label for job in self.jobs)

    @property
    def parts(self) -> Sequence[Job]:
        return self.jobs

    def products(self, run: RunPaths) -> list[Path]:
        """Nothing of its own: each row has its marker."""
        return []


def command_line(words: Sequence[object], options: Mapping[str, object], **flags: bool) -> str:
    """Return a command that a reader can type; options that are None are left out."""
    given = [each for pair in options.items() if pair[1] is not None for each in pair]
    given += [f"--{flag.replace('_', '-')}" for flag, is_set in flags.items() if is_set]
    return shlex.join(["streamline-bench", *map(str, words), *map(str, given)])


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
    """

    schema_version: Literal[1] = 1
    key: str
    seconds: float = Field(ge=0)
    attempts: int = Field(ge=1)
    command: str | None = None
    files: dict[str, FileMark]
    facts: Facts = Facts()


class Failed(Frozen):
    """Why an attempt failed, in a sentence."""

    schema_version: Literal[1] = 1
    key: str
    reason: str
    attempts: int


_Marker = TypeVar("_Marker", Done, Failed)


def read_done(run: RunPaths, name: str, key: str) -> Done | None:
    """Return the marker of a job whose result is there and whole, else None."""
    done = _read(Done, run.job(name) / "done.json", key)
    whole = done and all(_is_whole(run.root / path, mark) for path, mark in done.files.items())
    return done if whole else None


def write_done(
    run: RunPaths,
    name: str,
    *,
    key: str,
    seconds: float,
    products: Sequence[Path],
    result: Result | None = None,
) -> None:
    """Write the marker of a finished job and remove that of an earlier failure."""
    result = result or Result()
    found = (each for path in products for each in [path, *sorted(path.rglob("*"))])
    done = Done(
        key=key,
        seconds=round(max(0.0, seconds), 3),
        attempts=max(1, _attempts(run, name)),
        command=result.command,
        files={run.relative(path): _mark(path) for path in found if path.is_file()},
        facts=result.facts,
    )
    atomic_write_text(run.job(name) / "done.json", done.model_dump_json(indent=2) + "\n")
    forget_failure(run, name)


def write_failed(run: RunPaths, name: str, *, key: str, reason: str) -> None:
    """Note why a job failed, on one line (OutputError: the job's folder cannot be written)."""
    failed = Failed(key=key, reason=" ".join(reason.split()), attempts=_attempts(run, name))
    text = failed.model_dump_json(indent=2) + "\n"
    atomic_write_text(run.job(name) / "failed.json", text)


def done_key(run: RunPaths, name: str) -> str | None:
    """Return the key of the result that a job left; whether its files are whole is not looked at.

    None: it has none.
    """
    try:
        key = json.loads((run.job(name) / "done.json").read_text("utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return key if isinstance(key, str) else None


def read_failed(run: RunPaths, name: str, key: str) -> Failed | None:
    """Return why this job's last attempt failed, None if it did not say."""
    return _read(Failed, run.job(name) / "failed.json", key)


def _read(kind: type[_Marker], path: Path, key: str) -> _Marker | None:
    """A marker of this key; None: not there, damaged, or of another release."""
    try:
        marker = kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None
    return marker if marker.key == key else None


def forget_failure(run: RunPaths, name: str) -> None:
    """Remove the note of an earlier failure, which a process that says nothing would inherit."""
    path = run.job(name) / "failed.json"
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be removed ({error.strerror}).") from None


def count_attempt(run: RunPaths, name: str) -> int:
    """Count one more attempt of a job, before it does anything; return its number from 1."""
    number = _attempts(run, name) + 1
    atomic_write_text(run.job(name) / "attempts.json", json.dumps(number) + "\n")
    return number


def _attempts(run: RunPaths, name: str) -> int:
    try:
        number: Any = json.loads((run.job(name) / "attempts.json").read_text("utf-8"))
    except (OSError, ValueError):
        return 0
    return number if isinstance(number, int) and number > 0 else 0


def _mark(path: Path) -> FileMark:
    size = path.stat().st_size
    return FileMark(size, file_sha256(path) if size <= _HASHED_UP_TO else None)


def _is_whole(path: Path, mark: FileMark) -> bool:
    try:
        return _mark(path) == mark
    except OSError:
        return False


def last_line(log: Path) -> str:
    """The last line of a log that is not empty, at most 300 characters."""
    try:
        tail = log.read_bytes()[-8192:].decode("utf-8", "replace")
    except OSError:
        return "its log cannot be read"
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
