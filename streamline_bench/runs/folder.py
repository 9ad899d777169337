"""Where things lie in a run folder, and the lock that keeps two runs out of one folder.

::

    <run>/plan.yaml                    what is compared; written first
    <run>/jobs/<job>/job.json          what the job is asked
    <run>/jobs/<job>/log.txt           what its process printed
    <run>/jobs/<job>/done.json         written last: key, duration, attempts, files it made
    <run>/jobs/<job>/failed.json       why the last attempt failed
    <run>/<label>/checkpoint, eval     what the jobs made
    <run>/run.json, leaderboard.*      made when every job has ended
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamline_bench.core.folder_lock import lock_folder
from streamline_bench.errors import OutputError
from streamline_bench.runs.plan import PLAN_FILE, Plan, differences, read_plan, write_plan

__all__ = ["claim", "job_folder", "locked"]


def job_folder(run: Path, name: str) -> Path:
    """Return the folder of a job."""
    return run / "jobs" / name


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder (made if missing); the system frees it when the process ends, however.

    Raises:
        OutputError: another run holds it, or it cannot be written or holds something else.
    """
    _check_usable(run)
    with lock_folder(run):
        yield


def claim(run: Path, plan: Plan) -> None:
    """Make the folder belong to this plan, or check that it does already.

    Raises:
        OutputError: it was started with another plan; the differences are named.
    """
    there = read_plan(run)
    if there is None:
        write_plan(run, plan)
        return
    found = differences(there, plan)
    if found:
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise OutputError(
            f"{run} was started with other options ({'; '.join(found[:4])}{more}); "
            "give the same ones to continue it, or another --output."
        )


def _check_usable(run: Path) -> None:
    if run.exists() and not run.is_dir():
        raise OutputError(f"{run} is not a folder; give another --output.")
    try:
        names = [path.name for path in run.iterdir()] if run.is_dir() else []
    except OSError as error:
        raise OutputError(f"{run} cannot be read ({error.strerror}).") from None
    # A run that was killed before its plan was written leaves only hidden files.
    if PLAN_FILE not in names and any(not name.startswith(".") for name in names):
        raise OutputError(
            f"{run} exists and is no run folder (it has no {PLAN_FILE}); give another --output."
        )
