"""The job that scores one model with the stock harness, in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from streamline_bench.core.files import staged_output
from streamline_bench.errors import EvaluationError
from streamline_bench.harness.tasks.asked_tasks import task_folders
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Facts, Job, Result
from streamline_bench.runs.jobs.kinds import compress_name
from streamline_bench.runs.planning.plan import Evaluation


class ScoreJob(Job):
    """Score the model of one row; or the dense model once more, which gives the noise floor.

    Attributes:
        label: of the row.
        dense: the row is the model itself, which has no checkpoint of its own.
        engine: None: transformers.
        noise: names the repetition, whose result is not the row's; None for the row itself.
        shareable: it may be done in one process with others, layers in common run once.
        alone: why it is done by itself, where others are scored together.
    """

    kind: Literal["score"] = "score"
    label: str
    dense: bool
    evaluation: Evaluation
    engine: str | None = None
    noise: str | None = None
    shareable: bool = False
    alone: str | None = None

    @property
    def name(self) -> str:
        return super().name if self.noise is None else f"noise-{self.noise}"

    @property
    def labels(self) -> tuple[str, ...]:
        return super().labels if self.noise is None else ()

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.dense else (compress_name(self.label),)

    def output(self, run: RunPaths) -> Path:
        """Where the harness's files are in the end."""
        return run.evaluation(self.label) if self.noise is None else run.noise(self.noise)

    def products(self, run: RunPaths) -> list[Path]:
        return [self.output(run)]

    def pretrained(self, run: RunPaths) -> str:
        """Return what the harness loads."""
        return self.model if self.dense else str(run.checkpoint(self.label))

    def folder(self, run: RunPaths) -> Path:
        """Return the folder of the model that is scored (CheckpointError: it is not whole)."""
        from streamline_bench.core.checkpoint.folder import resolve_pretrained

        return resolve_pretrained(self.pretrained(run), self.revision if self.dense else None)

    def harness_command(self, run: RunPaths, output: Path) -> list[str]:
        """Return the command line that scores into ``output``, as a reader can type it too.

        It is the stock harness's; with the user's own task folder it is ours, which passes
        everything on: the stock one takes a single folder, and the packaged tasks must stay known
        as well.
        """
        asked, own = self.evaluation, self.evaluation.include_path
        model = {
            "pretrained": self.pretrained(run),
            "revision": self.revision if self.dense else None,
            "dtype": asked.dtype,
            "trust_remote_code": self.trust_remote_code or None,
        }
        command = [
            sys.executable, "-m",
            *(["lm_eval"] if own is None else ["streamline_bench", "lm-eval"]),
            "--model", f"streamline-{self.engine}" if self.engine else "streamline",
            "--model_args", _model_arguments(model),
            "--include_path", own or task_folders(None)[0],
            "--tasks", ",".join(asked.tasks),
            "--batch_size", asked.batch_size,
            "--device", self.device,
            "--output_path", str(output),
            "--log_samples",
        ]  # fmt: skip
        if asked.limit is not None:
            whole = asked.limit.is_integer()
            command += ["--limit", str(int(asked.limit) if whole else asked.limit)]
        if asked.num_fewshot is not None:
            command += ["--num_fewshot", str(asked.num_fewshot)]
        if asked.apply_chat_template:
            command.append("--apply_chat_template")
        return command

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
        done = subprocess.run(command, stdin=subprocess.DEVNULL, env={**environment, **os.environ})
        if done.returncode:
            why = last_line(run.log(self.name))
            raise EvaluationError(f"{command[2]} ended with exit code {done.returncode}: {why}")


def _model_arguments(model: Mapping[str, Any]) -> str:
    """``key=value,key=value``, or JSON where a value holds a character that would split it."""
    given = {key: value for key, value in model.items() if value is not None}
    if any(sign in str(value) for value in given.values() for sign in ",= "):
        return json.dumps(given)
    return ",".join(f"{key}={value}" for key, value in given.items())


def check_scores(folder: Path) -> None:
    """Read an evaluation as the report will, so that a damaged one fails its own row only."""
    from streamline_bench.stability.readers.lm_eval_reader import read_lm_eval

    read_lm_eval(folder, progress=False)


def last_line(log: Path) -> str:
    """The last line of a log that is not empty, at most 300 characters."""
    try:
        tail = log.read_bytes()[-8192:].decode("utf-8", "replace")
    except OSError:
        return "its log cannot be read"
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
