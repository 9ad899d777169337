"""Scores one model with the stock harness, in a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamline_bench.core.staging import staged_output
from streamline_bench.errors import EvaluationError
from streamline_bench.runs.folder import job_folder
from streamline_bench.runs.harness_command import (
    harness_command,
    model_of,
    reader_command,
    task_folder,
)
from streamline_bench.runs.plan import Evaluation
from streamline_bench.runs.work import Product

__all__ = ["call_harness", "check_scores", "last_line", "score_row"]


def score_row(run: Path, name: str, payload: Mapping[str, Any]) -> Product:
    """Let the harness write into a hidden folder, check it, and publish it in one step.

    Raises:
        EvaluationError: the harness failed.
        SamplesError: a task yielded no samples, or samples are not whole.
        NumericsError: a log-likelihood is NaN.
    """
    evaluation = Evaluation.model_validate(payload["evaluation"])
    model = model_of(run, payload)
    output = run / payload["output"]
    with staged_output(output, overwrite=True) as staging:
        command = harness_command(
            model,
            staging,
            evaluation,
            device=payload["device"],
            engine=payload.get("engine"),
        )
        print(shlex.join(command), flush=True)
        try:
            call_harness(command, job_folder(run, name) / "log.txt")
        except EvaluationError:
            _refuse_unloadable(evaluation)
            raise
        check_scores(staging)
    facts: dict[str, Any] = {"together": [], "alone": payload.get("alone")}
    return Product([payload["output"]], command=reader_command(run, payload), facts=facts)


def _refuse_unloadable(evaluation: Evaluation) -> None:
    """Name the task that the harness failed at, which its own last line does not.

    Raises:
        EvaluationError: one of several tasks cannot be loaded, for whatever reason.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=task_folder(evaluation))
    for name in evaluation.tasks:
        try:
            manager.load([name])
        except Exception as error:
            said = " ".join(f"{type(error).__name__} {error}".split())[:200]
            raise EvaluationError(
                f"The harness cannot load the task '{name}' ({said}); check that its data is "
                "there and not empty."
            ) from error


def check_scores(folder: Path) -> None:
    """Read an evaluation as the report will, so that a damaged one fails its own row only.

    Raises:
        SamplesError: files are missing or not whole, or a task has no samples.
        NumericsError: a log-likelihood is NaN.
    """
    from streamline_bench.stability.lm_eval_reader import read_lm_eval

    read_lm_eval(folder, progress=False)


def call_harness(command: list[str], log: Path) -> None:
    """Run a command whose output goes to this process's own, which ``log`` keeps.

    Raises:
        EvaluationError: it failed; the last line of the log says why.
    """
    environment = {"TOKENIZERS_PARALLELISM": "false", "LMEVAL_LOG_LEVEL": "WARNING"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, env={**environment, **os.environ})
    if done.returncode:
        raise EvaluationError(
            f"{command[2]} ended with exit code {done.returncode}: {last_line(log)}"
        )


def last_line(log: Path) -> str:
    """The last line of a log that is not empty, at most 300 characters."""
    try:
        tail = log.read_bytes()[-8192:].decode("utf-8", "replace")
    except OSError:
        return "its log cannot be read"
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
