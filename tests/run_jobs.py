"""Jobs of a comparison with as little in them as tests of the machinery need."""

from __future__ import annotations

from typing import Any, ClassVar

from streamline_bench.runs.execution.processes import Ended
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Job, Result, count_attempt, write_done
from streamline_bench.runs.jobs.kinds import CompressJob, MeasureJob
from streamline_bench.runs.jobs.score import ScoreJob, ScoreTogether
from streamline_bench.runs.planning.plan import Evaluation

MODEL: dict[str, Any] = {"model": "m", "device": "cpu"}


def compress_job(label: str, **more: Any) -> CompressJob:
    """Return the job ``compress-<label>`` with the key ``c<label>``."""
    given = {"key": f"c{label}", **MODEL, **more}
    return CompressJob(label=label, weights_sha256="w", recipe={}, **given)


def score_job(label: str, **more: Any) -> ScoreJob:
    """Return the job ``score-<label>`` with the key ``s<label>``."""
    evaluation = Evaluation(tasks=("t",), tasks_sha256="", batch_size="1")
    given = {"key": f"s{label}", "dense": label == "dense", **MODEL, **more}
    return ScoreJob(label=label, evaluation=evaluation, **given)


def measure_job() -> MeasureJob:
    """Return the job ``throughput``."""
    rows = {"dense": False}
    return MeasureJob(
        key="k", rows=rows, dense="dense", engine="hf", workload={}, threads=1, **MODEL
    )


class Marking:
    """An executor that does nothing and says that every job is done.

    Attributes:
        started: names of the jobs, in order.
    """

    started: ClassVar[list[str]] = []

    def __init__(self, *_: Any) -> None:
        self._waiting: list[tuple[RunPaths, Job]] = []

    def has_room(self, kind: str) -> bool:
        return True

    def at_once(self, kind: str) -> int:
        return 1

    def submit(self, run: RunPaths, job: Job) -> None:
        self.started.extend(part.name for part in job.parts)
        self._waiting.append((run, job))

    def ended(self, timeout: float) -> list[Ended]:
        found = []
        while self._waiting:
            run, job = self._waiting.pop(0)
            self.do(run, job)
            found.append(Ended(job.name, 0))
        return found

    def do(self, run: RunPaths, job: Job) -> None:
        for part in job.parts:
            count_attempt(run, part.name)
            write_done(run, part.name, key=part.key, seconds=1, products=[])

    def stop(self) -> None:
        pass


class InProcess(Marking):
    """An executor that does the jobs in this process, which spares the seconds of starting one.

    Attributes:
        taken: the compressions that were in the cache, of the last run that compressed.
    """

    started: ClassVar[list[str]] = []
    taken: ClassVar[list[str]] = []

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.taken.clear()

    def do(self, run: RunPaths, job: Job) -> None:
        import contextlib
        import io

        if isinstance(job, ScoreJob):  # its own way starts the harness's command
            asked = {**job.model_dump(exclude={"kind", "label"}), "jobs": (job,)}
            job = ScoreTogether.model_construct(**asked)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            result: Result = job.work(run)
        if "was in the cache" in said.getvalue():
            self.taken.append(job.name)
        if not isinstance(job, ScoreTogether):
            products = job.products(run)
            write_done(run, job.name, key=job.key, seconds=1, products=products, result=result)
