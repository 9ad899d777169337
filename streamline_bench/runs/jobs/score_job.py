"""Scores one model with the stock harness, in a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamline_bench.core.files.staging import staged_output
from streamline_bench.errors import EvaluationError
from streamline_bench.runs.folder import job_folder
from streamline_bench.runs.jobs.harness_command import harness_command, model_of, reader_command
from streamline_bench.runs.jobs.worker import Product
from streamline_bench.runs.planning.plan import Evaluation

__all__ = ["call_harness", "check_scores", "last_line", "score_row", "without_empty_tasks"]


def score_row(run: Path, name: str, payload: Mapping[str, Any]) -> Product:
    """Let the harness write into a hidden folder, check it, and publish it in one step.

    Tasks without documents, at which the harness ends, are left out of a second call.

    Raises:
        EvaluationError: the harness failed, or no task yielded documents.
        SamplesError: samples are not whole.
        NumericsError: a log-likelihood is NaN.
    """
    left_out: dict[str, str] = {}
    with staged_output(run / payload["output"], overwrite=True) as staging:
        try:
            _call(run, name, payload, staging)
        except EvaluationError:
            payload, left_out = without_empty_tasks(payload)
            if not left_out:
                raise
            print(f"Scored again without {', '.join(left_out)}.", flush=True)
            _call(run, name, payload, staging)
        check_scores(staging)
    facts: dict[str, Any] = {
        "together": [],
        "alone": payload.get("alone"),
        "not_compared": left_out,
    }
    return Product([payload["output"]], command=reader_command(run, payload), facts=facts)


def _call(run: Path, name: str, payload: Mapping[str, Any], staging: Path) -> None:
    command = harness_command(
        model_of(run, payload),
        staging,
        Evaluation.model_validate(payload["evaluation"]),
        device=payload["device"],
        engine=payload.get("engine"),
    )
    print(shlex.join(command), flush=True)
    call_harness(command, job_folder(run, name) / "log.txt")


def without_empty_tasks(payload: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Return what a scoring job can be asked, and task -> why it is left out.

    Raises:
        EvaluationError: a task cannot be loaded for another reason, which the last line of the
            harness does not name, or all are empty.
    """
    from streamline_bench.harness.tasks.asked_tasks import open_index
    from streamline_bench.harness.tasks.empty_tasks import without_empty

    evaluation = payload["evaluation"]
    names = list(evaluation["tasks"])
    kept, left_out = without_empty(open_index(names, evaluation["include_path"]), names)
    return {**payload, "evaluation": {**evaluation, "tasks": kept}}, left_out


def check_scores(folder: Path) -> None:
    """Read an evaluation as the report will, so that a damaged one fails its own row only.

    Raises:
        SamplesError: files are missing or not whole, or a task has no samples.
        NumericsError: a log-likelihood is NaN.
    """
    from streamline_bench.stability.readers.lm_eval_reader import read_lm_eval

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
