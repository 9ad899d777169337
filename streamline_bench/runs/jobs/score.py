"""The jobs that score: one model with the stock harness, or several that share lower layers.

One process runs shared layers once. The result of a row is the same as scored alone, and named by
the same key: what was finished in one way is kept in the other.
"""

from __future__ import annotations

import glob
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from streamline_bench.core.files import staged_output
from streamline_bench.core.machine.ranks import run_in_ranks
from streamline_bench.errors import EvaluationError, OutputError, StreamlineBenchError
from streamline_bench.harness.tasks.asked_tasks import include_folders
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import (
    Facts,
    Job,
    Result,
    Together,
    last_line,
    write_done,
    write_failed,
)
from streamline_bench.runs.jobs.kinds import compress_name
from streamline_bench.runs.planning.harness_options import Engine, harness_options
from streamline_bench.runs.planning.plan import Evaluation, digest

if TYPE_CHECKING:
    from streamline_bench.harness.trunk.request import LabelOutcome


_HANDED_ON = (
    "max_batch_size gen_kwargs system_instruction fewshot_as_multiturn metadata samples "
    "confirm_run_unsafe_code"
).split()
"""Options that a walk takes under the names of the evaluation."""


class ScoreJob(Job):
    """Score the model of one row; or the dense model once more, which gives the noise floor.

    Attributes:
        label: of the row.
        dense: the row is the model itself: a dense one, or a checkpoint made elsewhere.
        question: names the set of questions, if it is not the first one of the run folder.
        tokenizer, model_args: what the harness loads a checkpoint made elsewhere with.
        weights: names the model's content, where it is not made here.
        engine: of a repetition with another one; None: that of the evaluation.
        noise: names the repetition, whose result is not the row's; None for the row itself.
        shareable: it may be done in one process with others, layers in common run once.
        alone: why it is done by itself, where others are scored together.
        unread: tasks that it answers and that the command does not ask in this way.
    """

    kind: Literal["score"] = "score"
    label: str
    dense: bool
    evaluation: Evaluation
    question: str = ""
    tokenizer: str | None = None
    model_args: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    engine: Engine | None = None
    noise: str | None = None
    shareable: bool = False
    alone: str | None = None
    unread: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        name = super().name if self.noise is None else f"noise-{self.noise}"
        return f"{name}-{self.question}" if self.question else name

    @property
    def labels(self) -> tuple[str, ...]:
        return super().labels if self.noise is None else ()

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.dense else (compress_name(self.place),)

    def output(self, run: RunPaths) -> Path:
        """Where the harness's files are in the end."""
        if self.noise is None:
            return run.evaluation(self.place, self.question)
        return run.noise(self.noise, self.question)

    def products(self, run: RunPaths) -> list[Path]:
        return [self.output(run)]

    def pretrained(self, run: RunPaths) -> str:
        """Return what the harness loads."""
        return self.model if self.dense else str(run.checkpoint(self.place))

    def folder(self, run: RunPaths) -> Path:
        """Return the folder of the model that is scored (CheckpointError: it is not whole)."""
        from streamline_bench.core.checkpoint.folder import resolve_pretrained

        return resolve_pretrained(self.pretrained(run), self.revision if self.dense else None)

    def harness_command(self, run: RunPaths, output: Path) -> list[str]:
        """Return the command line that scores into ``output``, as a reader can type it too.

        It is the stock harness's; with the user's own task folders it is ours, which passes
        everything on: the stock one takes a single folder, and the packaged tasks must stay known
        as well.
        """
        asked, own = self.evaluation, self.evaluation.include_path
        engine = self.engine or asked.engine
        folders = ",".join(own or include_folders(None))
        model = {
            "pretrained": self.pretrained(run),
            "revision": self.revision if self.dense else None,
            "dtype": asked.dtype,
            "trust_remote_code": self.trust_remote_code or None,
            "tokenizer": self.tokenizer,
            **({"tensor_parallel_size": self.processes} if self._splits(engine) else {}),
            **asked.model_args,
            **self.model_args,
        }
        command = [
            sys.executable, "-m",
            *(["streamline_bench", "lm-eval"] if own else ["lm_eval"]),
            "--model", "streamline" if engine == "hf" else f"streamline-{engine}",
            "--model_args", _model_arguments(model),
            *(["--include_path", folders] if folders else []),
            "--tasks", ",".join(asked.tasks),
            "--batch_size", asked.batch_size,
            "--device", self.device,
            "--output_path", str(output),
            "--log_samples",
        ]  # fmt: skip
        return [*command, *harness_options(asked)]

    def _splits(self, engine: str) -> bool:
        """Whether vLLM splits the model over the job's GPUs; a plan may ask for another way."""
        given = self.evaluation.model_args.keys() | self.model_args.keys()
        own = {"tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size"}
        return engine == "vllm" and self.processes > 1 and not given & own

    @property
    def ranks(self) -> int:
        """Processes that share the documents; one where the engine spreads the model itself."""
        spread = {**self.evaluation.model_args, **self.model_args}.get("parallelize")
        return 1 if spread or (self.engine or self.evaluation.engine) == "vllm" else self.processes

    def reader_command(self, run: RunPaths) -> str:
        """Return the command that gives these answers, for a reader to type."""
        module, *rest = self.harness_command(run, self.output(run))[2:]
        return shlex.join(["lm_eval" if module == "lm_eval" else "streamline-bench", *rest])

    def without_empty_tasks(self) -> tuple[ScoreJob, dict[str, str]]:
        """Return the job without tasks that have no documents, and task -> why it is left out."""
        from streamline_bench.harness.tasks.asked_tasks import open_index, without_empty

        asked = self.evaluation
        index = open_index(asked.tasks, asked.include_path)
        kept, left_out = without_empty(index, asked.tasks)
        evaluation = asked.model_copy(update={"tasks": tuple(kept)})
        return self.model_copy(update={"evaluation": evaluation}), left_out

    def work(self, run: RunPaths) -> Result:
        """Let the harness write into a hidden folder, check it, and publish it in one step.

        Tasks without documents, at which the harness ends, are left out of a second call.
        """
        job, left_out = self, dict[str, str]()
        with staged_output(self.output(run), overwrite=True) as staging:
            try:
                job._call(run, staging)
            except EvaluationError:
                job, left_out = self.without_empty_tasks()
                if not left_out:
                    raise
                print(f"Scored again without {', '.join(left_out)}.", flush=True)
                job._call(run, staging)
            check_scores(staging)
        return Result(job.reader_command(run), Facts(alone=self.alone, not_compared=left_out))

    def _call(self, run: RunPaths, staging: Path) -> None:
        """Run the harness; its output is this process's output, which the job's log keeps."""
        command = self.harness_command(run, staging)
        print(shlex.join(command), flush=True)
        environment = {"TOKENIZERS_PARALLELISM": "false", "LMEVAL_LOG_LEVEL": "WARNING"}
        code = run_in_ranks(command, self.ranks, environment)
        if code:
            why = last_line(run.log(self.name))
            raise EvaluationError(f"{command[2]} ended with exit code {code}: {why}")


def _model_arguments(model: Mapping[str, Any]) -> str:
    """``key=value,key=value``, or JSON where a value holds a character that would split it."""
    given = {key: value for key, value in model.items() if value is not None}
    if any(
        isinstance(value, dict | list) or any(sign in str(value) for sign in ",= ")
        for value in given.values()
    ):
        return json.dumps(given)
    return ",".join(f"{key}={value}" for key, value in given.items())


def check_scores(folder: Path) -> None:
    """Read an evaluation as the report will, so that a damaged one fails its own row only."""
    from streamline_bench.stability.readers.lm_eval_reader import read_lm_eval

    read_lm_eval(folder, progress=False)


class ScoreTogether(Together):
    """Score several rows in one process, and mark each as done or failed.

    Attributes:
        jobs: the scoring jobs of the rows; all ask the same.
    """

    kind: Literal["together"] = "together"
    jobs: tuple[ScoreJob, ...] = Field(min_length=2)

    @property
    def name(self) -> str:
        return f"score-together-{digest([[job.name, job.key] for job in self.jobs])[:8]}"

    def work(self, run: RunPaths) -> Result:
        """Score the rows; those without a mark are scored alone if the walk cannot be made."""
        from streamline_bench.harness.trunk.request import TrunkRequest
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

        evaluation = self.jobs[0].evaluation
        size = evaluation.batch_size
        request = TrunkRequest(
            checkpoints={job.label: job.folder(run) for job in self.jobs},
            outputs=outputs,
            journal=run.answers,
            tasks=evaluation.tasks,
            include_path=tuple(map(Path, evaluation.include_path)),
            limit=evaluation.limit,
            num_fewshot=evaluation.num_fewshot,
            batch_size=int(size) if size.isdigit() else size,
            device=self.device,
            dtype=evaluation.dtype,
            apply_chat_template=evaluation.apply_chat_template,
            model_args=evaluation.model_args
            | ({"trust_remote_code": True} if self.trust_remote_code else {}),
            **{name: getattr(evaluation, name) for name in _HANDED_ON},
            **({} if evaluation.seed is None else {"seed": evaluation.seed}),
        )
        score_together(request, progress=True, on_label=publish)
        return Result()


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
