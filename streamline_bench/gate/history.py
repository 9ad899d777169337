"""The history of a machine: ``throughput.json`` files of earlier runs in a folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streamline_bench.core.files import atomic_write_text
from streamline_bench.errors import ComparisonError, OutputError, ThroughputError
from streamline_bench.gate.evidence import LEADERBOARD, speed_files
from streamline_bench.report.run_file import RUN_FILE, read_run_file
from streamline_bench.throughput.record import RECORD_NAME, read_record
from streamline_bench.throughput.speed import Speed, figures_of

log = logging.getLogger(__name__)

FEWEST_RUNS = 3
"""Runs of a history without which nothing is predicted."""


@dataclass(frozen=True)
class History:
    """Earlier runs of one machine, in order: label -> speed."""

    source: str
    runs: tuple[Mapping[str, Speed], ...]


def read_history(folder: Path, machine: str | None, last: int, run: Path) -> History:
    """Read the last runs of a machine: the files of the folder, and of run folders in it.

    Args:
        run: the one that is compared; a copy of it in the folder is not an earlier run.

    Raises:
        ThroughputError: a file is damaged.
        ComparisonError: the folder does not exist.
    """
    if not folder.is_dir():
        raise ComparisonError(
            f"The history '{folder}' is not a folder; make it, and keep runs in it with --keep."
        )
    files = [*folder.glob("*.json"), *folder.glob(f"*/{RECORD_NAME}")]
    files += folder.glob(f"*/throughput/{RECORD_NAME}")
    records = sorted(
        (read_record(file, f"remove it from the history '{folder}'") for file in files),
        key=lambda record: record.created,
    )
    now = [read_record(file) for file in records_of(run)]
    own = [record for record in records if record.environment.machine_id == machine]
    earlier = [record for record in own if record not in now]
    others = len(records) - len(own)
    if others and len(earlier) < FEWEST_RUNS:
        log.warning(
            "%s: %d of %d runs are of another machine and do not count; where the host name of one "
            "machine changes (containers), set STREAMLINE_BENCH_MACHINE to a name of your own.",
            folder, others, len(records),
        )  # fmt: skip
    return History(str(folder), tuple(figures_of(record) for record in earlier[-last:]))


def records_of(run: Path) -> list[Path]:
    """Return the ``throughput.json`` files that the speeds of a run are from; [] without one.

    Of a run folder, those that ``run.json`` names: an older measurement may lie there too.
    """
    if run.name == RECORD_NAME:
        return [run]
    if run.is_file() and run.name != LEADERBOARD:
        return []  # a reference
    folder = run if run.is_dir() else run.parent
    if (folder / RUN_FILE).is_file():
        return speed_files(folder, read_run_file(folder))
    return [folder / RECORD_NAME] if (folder / RECORD_NAME).is_file() else []


def require_records(run: Path) -> list[Path]:
    """Return :func:`records_of` a run.

    Raises:
        ThroughputError: there is none.
    """
    found = records_of(run)
    if not found:
        raise ThroughputError(
            f"'{run}' has no {RECORD_NAME} to keep; measure it with streamline-bench throughput, "
            "or leave --keep out."
        )
    return found


def keep(run: Path, folder: Path) -> list[Path]:
    """Copy the speeds of a run into a history, under the time of the run.

    Returns:
        The files, each whole; more than one where the rows were measured in several parts.

    Raises:
        ThroughputError: the run has none.
        OutputError: the folder cannot be written.
    """
    return [_kept(source, folder) for source in require_records(run)]


def _kept(source: Path, folder: Path) -> Path:
    text, created = source.read_text(encoding="utf-8"), read_record(source).created
    name = created.partition("+")[0].replace(":", "")
    target, number = folder / f"{name}.json", 1
    while target.exists() and target.read_text(encoding="utf-8") != text:
        number += 1
        target = folder / f"{name}-{number}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The history '{folder}' cannot be written ({error.strerror}).") from None
    atomic_write_text(target, text)
    return target
