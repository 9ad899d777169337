"""``python -m streamline_bench.runs.jobs.worker RUN JOB``: does one job of a run folder.

Exit codes: 0 done (``done.json`` is there), 2 failed for a reason in ``failed.json``.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

from pydantic import Field, TypeAdapter

from streamline_bench.core.machine.processes import hold_leash
from streamline_bench.core.machine.ranks import launched, say_once
from streamline_bench.errors import StreamlineBenchError
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Job, count_attempt, write_done, write_failed
from streamline_bench.runs.jobs.kinds import CompressJob, MeasureJob, TextJob, TextTogether
from streamline_bench.runs.jobs.score import ScoreJob, ScoreTogether

AnyJob = Annotated[
    CompressJob | ScoreJob | ScoreTogether | TextJob | TextTogether | MeasureJob,
    Field(discriminator="kind"),
]
"""A job as ``job.json`` holds it."""


def main(arguments: list[str]) -> int:
    """Do the job; return the exit code."""
    hold_leash()
    signal.signal(signal.SIGTERM, _stop)
    run, name = RunPaths(Path(arguments[0])), arguments[1]
    adapter: TypeAdapter[Job] = TypeAdapter(AnyJob)
    job = adapter.validate_json((run.job(name) / "job.json").read_bytes())
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    if launched().main:
        logging.getLogger("streamline_bench").setLevel(logging.INFO)
    if launched().count > 1:
        return _share(job, run)
    number = count_attempt(run, name)
    print(f"== {name}, attempt {number}", flush=True)
    started = time.monotonic()
    try:
        result = job.work(run)
        write_done(
            run, name, key=job.key, seconds=time.monotonic() - started,
            products=job.products(run), result=result,
        )  # fmt: skip
    except Exception as error:
        traceback.print_exc()
        write_failed(run, name, key=job.key, reason=_sentence(error, name))
        return 2
    return 0


def _share(job: Job, run: RunPaths) -> int:
    """Do the job together with other processes; the one that started them says how it ended."""
    try:
        job.work(run)
    except StreamlineBenchError as error:
        sentence = str(error)
        say_once(lambda: print(sentence, flush=True))
        return 2
    return 0


def _sentence(error: Exception, name: str) -> str:
    """One sentence for the table; the whole story is in the log."""
    if isinstance(error, StreamlineBenchError):
        return str(error)
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror or error}{where}; see jobs/{name}/log.txt."
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}; see jobs/{name}/log.txt."


def _stop(*_: object) -> NoReturn:
    # An exception, so that staged output is removed on the way out.
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
