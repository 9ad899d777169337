"""The history of a machine: ``throughput.json`` files of earlier runs in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streamline_bench.core.files import atomic_write_text
from streamline_bench.errors import ComparisonError, OutputError, ThroughputError
from streamline_bench.throughput.record import RECORD_NAME, read_record
from streamline_bench.throughput.speed import Speed, figures_of


@dataclass(frozen=True)
class History:
    """Earlier runs of one machine, in order: label -> speed."""

    source: str
    runs: tuple[Mapping[str, Speed], ...]


def read_history(folder: Path, machine: str | None, last: int) -> History:
    """Read the last runs of a machine: the files of the folder, and of run folders in it.

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
    records = sorted((read_record(file) for file in files), key=lambda record: record.created)
    own = [record for record in records if record.environment.machine_id == machine]
    return History(str(folder), tuple(figures_of(record) for record in own[-last:]))


def record_of(run: Path) -> Path:
    """Return the ``throughput.json`` of a run.

    Raises:
        ThroughputError: it has none.
    """
    if run.name == RECORD_NAME:
        return run
    folder = run if run.is_dir() else run.parent
    inside = (folder / RECORD_NAME, folder / "throughput" / RECORD_NAME)
    found = next((file for file in inside if file.is_file()), None)
    if found is None:
        raise ThroughputError(
            f"'{run}' has no {RECORD_NAME} to keep; measure it with streamline-bench throughput."
        )
    return found


def keep(run: Path, folder: Path) -> Path:
    """Copy the speeds of a run into a history, under the time of the run; whole or not at all.

    Raises:
        ThroughputError: the run has none.
        OutputError: the folder cannot be written.
    """
    source = record_of(run)
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
