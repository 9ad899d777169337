"""The demo: prune, replace, evaluate with the stock harness, compare, report.

Every step leaves a marker last (a manifest, ``done.json``, ``run.json``), so that a demo that was
interrupted continues where it stopped.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamline_bench.core.checkpoint import atomic_write_text, read_manifest
from streamline_bench.core.versions import package_versions
from streamline_bench.demo import TASKS, model
from streamline_bench.errors import OutputError, RecipeError, StreamlineBenchError
from streamline_bench.resources import resource

__all__ = ["DEMO_ROWS", "DemoOptions", "EvaluationError", "run_demo"]

log = logging.getLogger(__name__)

DEMO_ROWS: tuple[str, ...] = ("dense", "streamline_none", "streamline", "streamline_ffn_res")
STAGES: tuple[str, ...] = ("compress", "evaluate", "report")

THREADS = "1"
"""The model is too small for several threads to pay; on a busy machine they cost dearly."""

DEMO_OVERRIDES: Mapping[str, Any] = {"sequence_length": 128}
"""The bundled model was trained on blocks of this length."""


class EvaluationError(StreamlineBenchError):
    """The harness ended with an error."""


@dataclass(frozen=True)
class DemoOptions:
    """What ``streamline-bench demo`` takes.

    Attributes:
        output: run folder.
        rows: recipe names; the first one is what the others are compared with.
        sparsity: share of the parameters to remove.
        limit: documents per task, ``None`` for all.
        until: last stage to run.
        batch_size: what the harness is given.
    """

    output: Path
    rows: tuple[str, ...] = DEMO_ROWS
    sparsity: float = 0.25
    limit: int | None = None
    until: str = "report"
    batch_size: int = 32
    progress: bool = True


def run_demo(options: DemoOptions) -> Path:
    """Run the demo up to ``options.until`` and return the file to open next.

    Raises:
        StreamlineBenchError: any step's error.
    """
    if options.until not in STAGES:
        raise RecipeError(f"Unknown stage '{options.until}'; known: {', '.join(STAGES)}.")
    _claim(options)
    for number, label in enumerate(options.rows, start=1):
        log.info("[%d/%d] %s", number, len(options.rows), label)
        _compress_row(options, label)
        if options.until != "compress":
            _evaluate_row(options, label)
    if options.until != "report":
        return options.output
    _write_run_file(options)
    from streamline_bench.report import build_report

    return build_report(options.output)


def _claim(options: DemoOptions) -> None:
    """Note what this folder was started with; refuse to mix two different demos in it."""
    wanted = {
        "rows": list(options.rows),
        "sparsity": options.sparsity,
        "limit": options.limit,
    }
    path = options.output / "demo.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != wanted:
            raise OutputError(
                f"{options.output} holds a demo with other options ({found}); "
                "give another --output or pass --overwrite."
            )
        return
    if options.output.exists() and any(options.output.iterdir()):
        raise OutputError(f"{options.output} exists and is no demo folder; give another --output.")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(wanted, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"{options.output} cannot be written ({error.strerror}).") from None


def _checkpoint(options: DemoOptions, label: str) -> Path:
    return model() if label == "dense" else options.output / label / "checkpoint"


def _compress_row(options: DemoOptions, label: str) -> None:
    import torch

    from streamline_bench.methods import compress, load_recipe

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", THREADS)))
    recipe = load_recipe(
        label, {} if label == "dense" else {**DEMO_OVERRIDES, "sparsity": options.sparsity}
    )
    folder = _checkpoint(options, label)
    if label == "dense" or read_manifest(folder) is not None:
        return
    compress(model(), recipe, folder, progress=options.progress)
    manifest = read_manifest(folder)
    if manifest is not None:
        log.info(
            "  %d -> %d layers, %.1f %% of the parameters removed, %.0f s",
            manifest.layers_before,
            manifest.layers_after,
            100 * manifest.sparsity_reached,
            manifest.seconds["compress"],
        )


def harness_command(
    checkpoint: Path, output: Path, *, batch_size: int, limit: int | None
) -> list[str]:
    """Return the stock harness's command line for one row."""
    command = [
        sys.executable, "-m", "lm_eval",
        "--model", "streamline",
        "--model_args", f"pretrained={checkpoint}",
        "--include_path", str(resource("tasks") / "lm_eval"),
        "--tasks", TASKS,
        "--batch_size", str(batch_size),
        "--output_path", str(output),
        "--log_samples",
    ]  # fmt: skip
    return command if limit is None else [*command, "--limit", str(limit)]


def _evaluate_row(options: DemoOptions, label: str) -> None:
    folder = options.output / label
    done = folder / "evaluated.json"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = harness_command(
        _checkpoint(options, label).resolve(),
        (folder / "eval").resolve(),
        batch_size=options.batch_size,
        limit=options.limit,
    )
    started = time.time()
    _call(command, folder / "lm_eval.log", show_progress=options.progress)
    seconds = round(time.time() - started, 3)
    facts = {"command": shlex.join(["lm_eval", *command[3:]]), "seconds": seconds}
    atomic_write_text(done, json.dumps(facts, indent=2) + "\n")
    log.info("  evaluated in %.0f s", seconds)


def _call(command: Sequence[str], log_file: Path, *, show_progress: bool) -> None:
    """Run the harness; its log goes to a file, its progress bars to the terminal."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("LMEVAL_LOG_LEVEL", "WARNING")
    environment.setdefault("OMP_NUM_THREADS", THREADS)
    with log_file.open("w", encoding="utf-8") as stream:
        stderr = None if show_progress else subprocess.STDOUT
        code = subprocess.run(command, stdout=stream, stderr=stderr, env=environment).returncode
    if code:
        raise EvaluationError(
            f"lm_eval ended with exit code {code}; see {log_file} and run again to continue."
        )


def _write_run_file(options: DemoOptions) -> None:
    from streamline_bench.report.run_folder import RunFile, RunRow, write_run_file

    rows = []
    commands = []
    for label in options.rows:
        facts = json.loads((options.output / label / "evaluated.json").read_text("utf-8"))
        commands.append(facts["command"])
        manifest = read_manifest(_checkpoint(options, label))
        seconds = {"evaluate": facts["seconds"], **(manifest.seconds if manifest else {})}
        rows.append(
            RunRow(
                label=label,
                eval=f"{label}/eval",
                checkpoint=f"{label}/checkpoint" if manifest else None,
                recipe=manifest.recipe if manifest else None,
                seconds=seconds,
            )
        )
    run = RunFile(
        title="The bundled model",
        dense=options.rows[0],
        rows=rows,
        commands=commands,
        versions=package_versions(),
    )
    write_run_file(options.output, run)
