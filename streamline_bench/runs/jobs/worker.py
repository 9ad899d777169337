"""``python -m streamline_bench.runs.jobs.worker RUN JOB``: does one job of a run folder.

Exit codes: 0 done (``done.json`` is there), 2 failed for a reason in ``failed.json``.
"""

from __future__ import annotations

import importlib
import json
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from streamline_bench.core.machine.processes import hold_leash
from streamline_bench.errors import EvaluationError, StreamlineBenchError
from streamline_bench.runs.folder import job_folder, make_job_folder
from streamline_bench.runs.jobs.marker import count_attempt, write_done, write_failed

__all__ = ["Product", "main", "write_job"]

_WORKERS: Mapping[str, str] = {
    "compress": "compress_job:compress_row",
    "score": "score_job:score_row",
    "together": "together:score_rows_together",
    "text": "text_job:compare_text",
    "measure": "throughput_job:measure_rows",
}
"""Kind of job -> ``module:function`` of this package."""


@dataclass(frozen=True)
class Product:
    """What a job made.

    Attributes:
        paths: files and folders, relative to the run folder.
        command: what a reader can type to repeat it.
        facts: what is worth knowing about it.
    """

    paths: list[str]
    command: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def write_job(run: Path, name: str, kind: str, key: str, payload: Mapping[str, Any]) -> None:
    """Write what the job's process will read.

    Raises:
        OutputError: the job's folder cannot be written.
    """
    from streamline_bench.core.files.staging import atomic_write_text

    request = {"kind": kind, "key": key, "payload": dict(payload)}
    text = json.dumps(request, indent=2) + "\n"
    atomic_write_text(make_job_folder(run, name) / "job.json", text)


def main(arguments: list[str]) -> int:
    """Do the job; return the exit code."""
    hold_leash()
    signal.signal(signal.SIGTERM, _stop)
    run, name = Path(arguments[0]), arguments[1]
    request = json.loads((job_folder(run, name) / "job.json").read_text(encoding="utf-8"))
    key = request["key"]
    number = count_attempt(run, name)
    _set_up_log()
    print(f"== {name}, attempt {number}", flush=True)
    started = time.monotonic()
    try:
        product = _worker(request["kind"])(run, name, request["payload"])
        write_done(
            run, name, key=key, seconds=time.monotonic() - started, products=product.paths,
            command=product.command, facts=product.facts,
        )  # fmt: skip
    except Exception as error:
        traceback.print_exc()
        write_failed(run, name, key=key, reason=_sentence(error, name))
        return 2
    return 0


def _worker(kind: str) -> Callable[[Path, str, Mapping[str, Any]], Product]:
    """Return what does a kind of job; only that kind's modules are imported.

    Raises:
        EvaluationError: a kind that this release does not know.
    """
    if kind not in _WORKERS:
        raise EvaluationError(
            f"This release knows no job of kind '{kind}' (it knows {', '.join(_WORKERS)}); install "
            "the release that started the comparison."
        )
    module, _, function = _WORKERS[kind].partition(":")
    worker: Callable[[Path, str, Mapping[str, Any]], Product]
    worker = getattr(importlib.import_module(f"streamline_bench.runs.jobs.{module}"), function)
    return worker


def _sentence(error: Exception, name: str) -> str:
    """One sentence for the table; the whole story is in the log."""
    text = " ".join(str(error).split())
    if isinstance(error, StreamlineBenchError):
        return text
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror or text}{where}; see jobs/{name}/log.txt."
    return f"{type(error).__name__}: {text[:300]}; see jobs/{name}/log.txt."


def _set_up_log() -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("streamline_bench").setLevel(logging.INFO)


def _stop(*_: object) -> NoReturn:
    # An exception, so that staged output is removed on the way out.
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
