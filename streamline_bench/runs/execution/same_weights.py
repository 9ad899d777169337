"""Which jobs are about models with the same weights, so that one answer serves them all."""

from __future__ import annotations

from typing import Any

from streamline_bench.errors import StreamlineBenchError
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Job
from streamline_bench.runs.jobs.kinds import TextJob
from streamline_bench.runs.jobs.score import ScoreJob
from streamline_bench.runs.planning.plan import digest


class Weights:
    """Names models by their content; each checkpoint of a run is read once."""

    def __init__(self) -> None:
        self._known: dict[str, str | None] = {}

    def asked(self, run: RunPaths, job: Job) -> str | None:
        """Name the model of a job together with what it is asked; None: nothing to be shared.

        The checkpoint must be there.
        """
        if isinstance(job, ScoreJob) and job.noise is None:
            model = self.of(run, job)
            asked: Any = job.evaluation.model_dump(mode="json", exclude={"include_path"})
        elif isinstance(job, TextJob):
            other = job.other
            elsewhere = other and other.weights_sha256 + other.tokenizer_sha256
            model = elsewhere or self._checkpoint(run, job.place)
            asked = [job.model, job.dtype, job.text.model_dump(mode="json")]
        else:
            return None
        return None if model is None else digest([job.kind, model, asked])

    def of(self, run: RunPaths, job: ScoreJob) -> str | None:
        """Name the model that a job scores: its weights, its tokenizer, and how it is loaded."""
        weights = job.weights if job.dense else self._checkpoint(run, job.place)
        if weights is None:
            return None
        loaded = [job.evaluation.dtype, job.tokenizer, job.model_args]
        return digest([weights, loaded])

    def _checkpoint(self, run: RunPaths, place: str) -> str | None:
        if place not in self._known:
            self._known[place] = _content(run, place)
        return self._known[place]


def _content(run: RunPaths, place: str) -> str | None:
    from streamline_bench.core.checkpoint.reader import CheckpointReader
    from streamline_bench.harness.trunk.stack import tokenizer_sha256

    folder = run.checkpoint(place)
    if not (folder / "config.json").is_file():
        return None
    try:
        return CheckpointReader(folder).fingerprint(progress=False) + tokenizer_sha256(folder)
    except StreamlineBenchError:
        return None  # damaged, as its own job will say
