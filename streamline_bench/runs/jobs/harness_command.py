"""The harness's command line for one model."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamline_bench.harness.tasks.asked_tasks import task_folders
from streamline_bench.runs.planning.plan import Evaluation

__all__ = ["harness_command", "model_arguments", "model_of", "reader_command"]


def harness_command(
    model: Mapping[str, Any],
    output: Path,
    evaluation: Evaluation,
    *,
    device: str,
    engine: str | None = None,
) -> list[str]:
    """Return the command line, as a reader can type it too.

    It is the stock harness's; of the user's own task folder it is ours, which hands everything on:
    the stock one takes a single folder, and the packaged tasks must stay known beside the user's.

    Args:
        model: ``pretrained`` and what else goes into ``--model_args``.
        engine: None: transformers.
    """
    own = evaluation.include_path
    command = [
        sys.executable, "-m", *(["lm_eval"] if own is None else ["streamline_bench", "lm-eval"]),
        "--model", f"streamline-{engine}" if engine else "streamline",
        "--model_args", model_arguments(model),
        "--include_path", own or task_folders(None)[0],
        "--tasks", ",".join(evaluation.tasks),
        "--batch_size", evaluation.batch_size,
        "--device", device,
        "--output_path", str(output),
        "--log_samples",
    ]  # fmt: skip
    if evaluation.limit is not None:
        limit = evaluation.limit
        command += ["--limit", str(int(limit) if limit.is_integer() else limit)]
    if evaluation.num_fewshot is not None:
        command += ["--num_fewshot", str(evaluation.num_fewshot)]
    if evaluation.apply_chat_template:
        command.append("--apply_chat_template")
    return command


def model_arguments(model: Mapping[str, Any]) -> str:
    """``key=value,key=value``, or JSON where a value holds a character that would split it."""
    given = {key: value for key, value in model.items() if value is not None}
    if any(sign in str(value) for value in given.values() for sign in ",= "):
        return json.dumps(given)
    return ",".join(f"{key}={value}" for key, value in given.items())


def model_of(run: Path, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``--model_args`` of a scoring job."""
    return {
        "pretrained": payload["pretrained"] or str(run / payload["checkpoint"]),
        "revision": payload["revision"],
        "dtype": payload["evaluation"]["dtype"],
        "trust_remote_code": True if payload["trust_remote_code"] else None,
    }


def reader_command(run: Path, payload: Mapping[str, Any]) -> str:
    """Return the command that gives a scoring job's answers, for a reader to type."""
    command = harness_command(
        model_of(run, payload),
        run / payload["output"],
        Evaluation.model_validate(payload["evaluation"]),
        device=payload["device"],
        engine=payload.get("engine"),
    )
    module, *rest = command[2:]
    return shlex.join(["lm_eval" if module == "lm_eval" else "streamline-bench", *rest])
