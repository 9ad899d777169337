"""A run folder: where everything lies, whose it is, and the lock that keeps two runs out of it.

::

    <run>/plan.yaml                    what is compared, and what was before; written first
    <run>/jobs/<job>/job.json          the job, as its process reads it
    <run>/jobs/<job>/log.txt           what its process printed
    <run>/jobs/<job>/done.json         written last: key, duration, attempts, files it made
    <run>/jobs/<job>/failed.json       why the last attempt failed
    <run>/jobs/.answers                what unfinished rows of a walk have answered so far
    <run>/<row>/checkpoint, eval       what the jobs made; eval-<hash> has later questions
    <run>/run.json, leaderboard.*      made when every job has ended
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamline_bench.core.files import check_usable, lock_folder
from streamline_bench.errors import OutputError, few
from streamline_bench.runs.planning.growth import conflicts, grown
from streamline_bench.runs.planning.plan import PLAN_FILE, Plan, read_plan, write_plan

_FOLDERS = ("jobs", "noise", "throughput")
_FILES = ("run.json", *(f"leaderboard.{kind}" for kind in ("html", "md", "csv", "json")))
_PARTS_OF_A_ROW = ("checkpoint", "eval", "divergence.json")
_RESERVED = frozenset({*_FOLDERS, *_FILES, PLAN_FILE, "throughput.json", "report", "model-cards"})
"""Names that a run, or another command that writes into its folder, uses for itself."""

_ROW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


def is_row_name(label: str) -> bool:
    """Whether a row's folder may have this name; some file systems take A and a for the same."""
    name = label.lower()
    taken = name in _RESERVED or name.startswith(("leaderboard.", "throughput-"))
    return bool(_ROW_NAME.fullmatch(label)) and not taken


class RunPaths:
    """Every path of the run folder ``root``.

    Attributes:
        there: the folder itself, or the nearest one above it that exists.
        run_file: ``run.json``, which the report reads.
        page: the report.
        answers: what unfinished rows have answered, for the attempt after an interruption.
        scored: finished rows, for the moment until each is moved to its place.
        compressing: interrupted trainings, for the next attempt.
        states: hidden states that several rows are trained on, while one of them waits.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run_file = root / "run.json"
        self.page = root / "leaderboard.html"
        self.answers = self.job(".answers")
        self.scored = self.job(".scored")
        self.compressing = self.job(".compressing")
        self.states = self.compressing / "states"

    @property
    def there(self) -> Path:
        return next(path for path in (self.root, *self.root.parents) if path.exists())

    def job(self, name: str) -> Path:
        """Folder of a job."""
        return self.root / "jobs" / name

    def log(self, name: str) -> Path:
        """What the process of a job printed."""
        return self.job(name) / "log.txt"

    def checkpoint(self, place: str) -> Path:
        """The compressed model of a row."""
        return self.root / place / "checkpoint"

    def evaluation(self, place: str, questions: str = "") -> Path:
        """What the harness wrote for a row; ``questions`` names a set after the first."""
        return self.root / place / _with("eval", questions)

    def noise(self, name: str, questions: str = "") -> Path:
        """What the harness wrote when the dense model was scored once more."""
        return self.root / "noise" / name / _with("eval", questions)

    def measured(self, rows: str = "") -> Path:
        """What the measurement of speed wrote; ``rows`` names a set after the first."""
        return self.root / _with("throughput", rows)

    def divergence(self, place: str) -> Path:
        """How the next-token distributions of a row differ from the dense model's."""
        return self.root / place / "divergence.json"

    def relative(self, path: Path) -> str:
        """Return a path of this folder as the files in it name it."""
        return path.relative_to(self.root).as_posix()

    def make_job(self, name: str) -> Path:
        """Return the folder of a job; make it if it is missing (OutputError: it cannot be made)."""
        folder = self.job(name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            blocking = folder if folder.parent.is_dir() else folder.parent
            raise OutputError(
                f"{folder} cannot be made, because {blocking} is not a folder; remove it and run "
                "again."
            ) from None
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be made ({error.strerror}); remove the cause and run again."
            ) from None
        return folder


def _with(name: str, more: str) -> str:
    return f"{name}-{more}" if more else name


def check_output(run: Path) -> None:
    """Refuse an output folder that cannot be read or holds something else (OutputError)."""
    check_usable(run, PLAN_FILE, "a run folder")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder (made if missing); the system frees it when the process ends, however.

    OutputError: another run holds it, or it cannot be written or holds something else.
    """
    check_output(run)
    with lock_folder(run):
        yield


def claim(run: Path, plan: Plan, *, overwrite: bool = False) -> Plan:
    """Lay a plan over what the locked folder has, write it, and return it (OutputError: it cannot).

    Args:
        overwrite: what an earlier run of the same model made there is removed, and nothing else.
    """
    there = read_plan(run)
    if there is not None and overwrite:
        if there.weights_sha256 != plan.weights_sha256:
            raise OutputError(
                f"{run} holds a run of another model ({there.model}), which is not overwritten; "
                "delete it, or give another --output."
            )
        _remove_results(run, there)
        there = None
    found = conflicts(there, plan) if there is not None else []
    if found:
        raise OutputError(
            f"{run} cannot be continued, because what is there would no longer be true: "
            f"{few(found, separator='; ')}; give another --output."
        )
    now = grown(there, plan)
    if now != there:
        write_plan(run, now)
    return now


def _remove_results(run: Path, plan: Plan) -> None:
    """Remove what a run makes; a file that someone else put there stays."""
    made = [run / name for name in (*_FILES, *_FOLDERS)]
    made += run.glob("throughput-*")
    # A plan that was tampered with must not reach outside.
    places = [row.place for row in (*plan.rows, *plan.others)]
    rows = [run / place for place in places if is_row_name(place)]
    rows = [row for row in rows if row.is_dir() and not row.is_symlink()]
    made += [row / name for row in rows for name in _PARTS_OF_A_ROW]
    made += [path for row in rows for path in row.glob("eval-*")]
    try:
        for path in made:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for row in rows:
            if not any(row.iterdir()):
                row.rmdir()
    except OSError as error:
        raise OutputError(f"{run} cannot be emptied ({error.strerror}).") from None
