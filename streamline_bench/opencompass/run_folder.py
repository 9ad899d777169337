"""A whole OpenCompass comparison in one folder: compress, config, run, check, ``run.json``.

::

    <folder>/opencompass.json     what was asked; the same command again continues it
    <folder>/config.py            for ``opencompass``
    <folder>/work/<time>/         OpenCompass's predictions, results, logs, summary
    <folder>/run.json             last; ``streamline-bench report`` reads it
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamline_bench.core.checkpoint import Manifest, atomic_write_text
from streamline_bench.core.versions import package_versions
from streamline_bench.errors import OutputError
from streamline_bench.opencompass.execution import Environment, run_opencompass
from streamline_bench.opencompass.run_plan import ModelEntry, RunPlan, config_text
from streamline_bench.opencompass.source import find_source
from streamline_bench.report.run_folder import RunFile, RunRow, write_run_file

__all__ = ["claim_folder", "evaluate", "write_config"]

log = logging.getLogger(__name__)

CLAIM = "opencompass.json"


def claim_folder(folder: Path, plan: RunPlan, *, overwrite: bool = False) -> None:
    """Note what a folder was started with; refuse to mix two different runs in it.

    Raises:
        OutputError: it holds something else, or cannot be written.
    """
    path = folder / CLAIM
    if overwrite and path.exists():
        shutil.rmtree(folder)
    wanted = json.loads(json.dumps(plan.as_data()))
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) == wanted:
            return
        if (folder / "work").exists():
            raise OutputError(
                f"{folder} holds an OpenCompass run of other models, data sets or options; give "
                "another --output or pass --overwrite."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} exists and is no OpenCompass run; give another --output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(wanted, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"{folder} cannot be written ({error.strerror}).") from None


def write_config(folder: Path, plan: RunPlan) -> Path:
    """Write ``config.py`` and return it."""
    path = folder / "config.py"
    atomic_write_text(path, config_text(plan))
    return path


def evaluate(
    folder: Path,
    plan: RunPlan,
    environment: Environment,
    *,
    in_process: bool = False,
    progress: bool = True,
) -> RunFile:
    """Compress every model, run OpenCompass and write ``run.json``.

    Raises:
        StreamlineBenchError: a model cannot be compressed, or OpenCompass did not finish.
    """
    folder = folder.resolve()
    manifests, seconds = _compress_all(plan)
    config = write_config(folder, plan)
    started = time.monotonic()
    run, command = run_opencompass(
        environment, config, folder, in_process=in_process, progress=progress
    )
    log.info("OpenCompass finished in %.0f s: %s", time.monotonic() - started, run)
    rows = [
        _row(entry, run.relative_to(folder), manifests[entry.label], seconds[entry.label])
        for entry in plan.models
    ]
    result = RunFile(
        title="OpenCompass",
        dense=plan.models[0].label,
        rows=rows,
        commands=[shlex.join(command)],
        versions={**package_versions(), **environment.versions},
    )
    write_run_file(folder, result)
    return result


def _compress_all(
    plan: RunPlan,
) -> tuple[dict[str, tuple[str, Manifest | None]], dict[str, Mapping[str, float]]]:
    """Compress here and now; the classes find the results in the cache."""
    found: dict[str, tuple[str, Manifest | None]] = {}
    seconds: dict[str, Mapping[str, float]] = {}
    for number, entry in enumerate(plan.models, start=1):
        log.info("[%d/%d] %s", number, len(plan.models), entry.label)
        options: dict[str, Any] = {**entry.overrides}
        if entry.recipe is not None:
            options["recipe"] = entry.recipe
        for key in ("device", "cache", "revision", "trust_remote_code"):
            if key in plan.options:
                options[key] = plan.options[key]
        prepared = find_source(entry.path, options).prepared
        found[entry.label] = (prepared.pretrained, prepared.manifest)
        seconds[entry.label] = prepared.manifest.seconds if prepared.manifest else {}
    return found, seconds


def _row(
    entry: ModelEntry,
    run: Path,
    found: tuple[str, Manifest | None],
    seconds: Mapping[str, float],
) -> RunRow:
    path, manifest = found
    return RunRow(
        label=entry.label,
        eval=str(run / "predictions" / entry.label),
        checkpoint=str(Path(path).resolve()) if manifest else None,
        recipe=manifest.recipe if manifest else None,
        seconds=dict(seconds),
    )
