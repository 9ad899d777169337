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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamline_bench.core.files import atomic_write_text, check_usable, lock_folder
from streamline_bench.core.machine.environment import package_versions
from streamline_bench.errors import OutputError
from streamline_bench.harness.preparation import PreparedModel
from streamline_bench.opencompass.execution import Environment, run_opencompass
from streamline_bench.opencompass.run_plan import RunPlan, config_text, source_keys
from streamline_bench.opencompass.source import entry_source
from streamline_bench.report.run_file import RUN_FILE, RunFile, RunRow, write_run_file

log = logging.getLogger(__name__)

CLAIM = "opencompass.json"
_REPORT = ("json", "csv", "md", "html")
_MADE = (
    *("work", "scratch", "config.py", "opencompass.log", RUN_FILE),
    *(f"leaderboard.{kind}" for kind in _REPORT),
    CLAIM,
)


@contextmanager
def claimed_folder(folder: Path, plan: RunPlan, *, overwrite: bool = False) -> Iterator[None]:
    """Hold a folder for this run alone, and note in it what the run was asked.

    Args:
        overwrite: remove what an earlier run made there, once the plan has proved good.

    Raises:
        OutputError: another run is at work there, it holds something else, or cannot be written.
        StreamlineBenchError: the plan has no config.
    """
    config_text(plan)
    check_usable(folder, CLAIM, "an OpenCompass run")
    with lock_folder(folder):
        if overwrite:
            _remove_run(folder)
        _claim(folder, plan)
        yield


def _remove_run(folder: Path) -> None:
    """Remove what a run makes, and nothing else; the claim last."""
    try:
        for name in _MADE:
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be cleared ({error.strerror or error}); give another --output."
        ) from None


def _claim(folder: Path, plan: RunPlan) -> None:
    path = folder / CLAIM
    wanted = json.loads(json.dumps(plan.as_data()))
    try:
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path} is damaged ({error}); pass --overwrite to begin anew, or give another "
            "--output."
        ) from None
    if there == wanted:
        return
    if there is not None and (folder / "work").exists():
        raise OutputError(
            f"{folder} holds an OpenCompass run of other models, data sets or options; give "
            "another --output or pass --overwrite."
        )
    atomic_write_text(path, json.dumps(wanted, indent=2) + "\n")


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
    prepared = {}
    for number, entry in enumerate(plan.models, start=1):
        log.info("[%d/%d] %s", number, len(plan.models), entry.label)
        # Compressed here and now; the classes find the result in the cache.
        source = entry_source(**source_keys(plan, entry), for_vllm=plan.engine == "vllm")
        prepared[entry.label] = source.prepared
    config = write_config(folder, plan)
    started = time.monotonic()
    run, command = run_opencompass(
        environment, config, folder, in_process=in_process, progress=progress
    )
    log.info("OpenCompass finished in %.0f s: %s", time.monotonic() - started, run)
    result = RunFile(
        title="OpenCompass",
        dense=plan.models[0].label,
        rows=[_row(label, run.relative_to(folder), model) for label, model in prepared.items()],
        commands=[shlex.join(command)],
        versions={**package_versions(), **environment.versions},
    )
    write_run_file(folder, result)
    return result


def _row(label: str, run: Path, model: PreparedModel) -> RunRow:
    manifest = model.manifest
    return RunRow(
        label=label,
        eval=str(run / "predictions" / label),
        checkpoint=str(Path(model.pretrained).resolve()) if manifest else None,
        recipe=manifest.recipe if manifest else None,
        seconds=dict(manifest.seconds) if manifest else {},
    )
