"""Rows that share lower layers, scored by one process that runs those layers once.

The result of a row is the same as scored alone, and named by the same key: what was finished in
one way is kept in the other.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from streamline_bench.errors import OutputError, StreamlineBenchError
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Facts, Job, Result, write_done, write_failed
from streamline_bench.runs.jobs.score import ScoreJob, check_scores
from streamline_bench.runs.planning.plan import digest

if TYPE_CHECKING:
    from streamline_bench.harness.trunk.request import LabelOutcome, TrunkRequest


class ScoreTogether(Job):
    """Score several rows in one process, and mark each as done or failed.

    Attributes:
        jobs: the scoring jobs of the rows; all ask the same.
    """

    kind: Literal["together"] = "together"
    jobs: tuple[ScoreJob, ...] = Field(min_length=2)

    @property
    def name(self) -> str:
        return f"score-together-{digest([[job.name, job.key] for job in self.jobs])[:8]}"

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(job.label for job in self.jobs)

    @property
    def parts(self) -> Sequence[Job]:
        return self.jobs

    def products(self, run: RunPaths) -> list[Path]:
        """Nothing of its own: each row has its marker."""
        return []

    def work(self, run: RunPaths) -> Result:
        """Score the rows; those without a mark are scored alone if the walk cannot be made."""
        from streamline_bench.harness.trunk.score import score_together

        by_label = {job.label: job for job in self.jobs}
        # A key in the name: an output of other options is never taken for this one's.
        outputs = {job.label: run.scored / f"{job.label}-{job.key[:16]}" for job in self.jobs}
        _forget_others(outputs)

        def publish(label: str, result: LabelOutcome) -> None:
            job = by_label[label]
            if result.status == "failed":
                reason = result.reason or "It could not be scored."
                write_failed(run, job.name, key=job.key, reason=reason)
            else:
                _publish(run, job, outputs[label], result)

        score_together(self._request(run, outputs), progress=True, on_label=publish)
        return Result()

    def _request(self, run: RunPaths, outputs: Mapping[str, Path]) -> TrunkRequest:
        from streamline_bench.harness.trunk.request import TrunkRequest

        evaluation = self.jobs[0].evaluation
        size = evaluation.batch_size
        return TrunkRequest(
            checkpoints={job.label: job.folder(run) for job in self.jobs},
            outputs=dict(outputs),
            journal=run.answers,
            tasks=evaluation.tasks,
            include_path=Path(evaluation.include_path) if evaluation.include_path else None,
            limit=evaluation.limit,
            num_fewshot=evaluation.num_fewshot,
            batch_size=int(size) if size.isdigit() else size,
            device=self.device,
            dtype=evaluation.dtype,
            apply_chat_template=evaluation.apply_chat_template,
            model_args={"trust_remote_code": True} if self.trust_remote_code else {},
        )


def score_together_job(jobs: Sequence[ScoreJob]) -> Job:
    """Return the job that does these, at least two, in one process."""
    first = jobs[0]
    return ScoreTogether(
        key=digest(["together", [job.key for job in jobs]]),
        model=first.model,
        device=first.device,
        trust_remote_code=first.trust_remote_code,
        environment=first.environment,
        jobs=tuple(jobs),
    )


def forget_answers(run: RunPaths) -> None:
    """Remove what walks keep for another attempt, once every row has its result."""
    for folder in (run.scored, run.answers):
        shutil.rmtree(folder, ignore_errors=True)


def _forget_others(outputs: Mapping[str, Path]) -> None:
    """Remove outputs that these rows left with other options, or another version, long ago."""
    for label, output in outputs.items():
        for path in output.parent.glob(f"{glob.escape(label)}-*"):
            if path.name.rpartition("-")[0] == label and path != output:
                shutil.rmtree(path, ignore_errors=True)


def _publish(run: RunPaths, job: ScoreJob, made: Path, result: LabelOutcome) -> None:
    """Check one row's scores, move them to their place and say that they are there."""
    target = job.output(run)
    try:
        check_scores(made)
    except StreamlineBenchError as error:
        # Left here, they would be taken for this row's result again, and fail again.
        shutil.rmtree(made, ignore_errors=True)
        write_failed(run, job.name, key=job.key, reason=str(error))
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(target)  # not vouched for by a marker, or this row would not be here
        made.rename(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error.strerror}).") from None
    asked = job.without_empty_tasks()[0] if result.left_out else job
    facts = Facts(together=result.company, alone=result.reason, not_compared=result.left_out)
    write_done(
        run,
        job.name,
        key=job.key,
        seconds=result.seconds,
        products=job.products(run),
        result=Result(asked.reader_command(run), facts),
    )
