"""Where things lie in a run folder, and the lock that keeps two runs out of one folder.

::

    <run>/plan.yaml                    what is compared; written first
    <run>/jobs/<job>/job.json          what the job is asked
    <run>/jobs/<job>/log.txt           what its process printed
    <run>/jobs/<job>/done.json         written last: key, duration, attempts, files it made
    <run>/jobs/<job>/failed.json       why the last attempt failed
    <run>/jobs/.answers                what unfinished rows of a walk have answered so far
    <run>/<label>/checkpoint, eval     what the jobs made
    <run>/run.json, leaderboard.*      made when every job has ended
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamline_bench.core.files.locks import check_usable, lock_folder
from streamline_bench.errors import OutputError
from streamline_bench.runs.planning.plan import PLAN_FILE, Plan, differences, read_plan, write_plan
from streamline_bench.runs.planning.rows import FILES, FOLDERS, PARTS_OF_A_ROW, is_row_name

__all__ = ["check_output", "claim", "job_folder", "locked", "make_job_folder"]


def job_folder(run: Path, name: str) -> Path:
    """Return the folder of a job."""
    return run / "jobs" / name


def make_job_folder(run: Path, name: str) -> Path:
    """Return the folder of a job, made if it is missing.

    Raises:
        OutputError: it cannot be made.
    """
    folder = job_folder(run, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        blocking = folder if folder.parent.is_dir() else folder.parent
        raise OutputError(
            f"{folder} cannot be made, because {blocking} is not a folder; remove it and run again."
        ) from None
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be made ({error.strerror}); run again when it can."
        ) from None
    return folder


def check_output(run: Path) -> None:
    """Refuse, before anything is made, an output that holds something else than a run.

    Raises:
        OutputError: it does, or cannot be read.
    """
    check_usable(run, PLAN_FILE, "a run folder")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder (made if missing); the system frees it when the process ends, however.

    Raises:
        OutputError: another run holds it, or it cannot be written or holds something else.
    """
    check_output(run)
    with lock_folder(run):
        yield


def claim(run: Path, plan: Plan, *, overwrite: bool = False) -> None:
    """Make the folder, which is locked, belong to this plan, or check that it does already.

    Args:
        overwrite: what an earlier run of the same model made there is removed, and nothing else.

    Raises:
        OutputError: it was started with another plan (the differences are named), or, with
            ``overwrite``, for another model.
    """
    there = read_plan(run)
    if there is not None and overwrite:
        if there.weights_sha256 != plan.weights_sha256:
            raise OutputError(
                f"{run} holds a run of another model ({there.model}), which is not overwritten; "
                "delete it, or give another --output."
            )
        _remove_results(run, there)
        write_plan(run, plan)
        return
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


def _remove_results(run: Path, plan: Plan) -> None:
    """Remove what a run makes; a file that someone else put there stays."""
    made = [run / name for name in (*FILES, *FOLDERS)]
    # A plan that was tampered with must not reach outside.
    rows = [run / row.label for row in plan.rows if is_row_name(row.label)]
    rows = [row for row in rows if row.is_dir() and not row.is_symlink()]
    made += [row / name for row in rows for name in PARTS_OF_A_ROW]
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
