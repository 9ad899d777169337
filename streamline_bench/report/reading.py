"""The evaluations and measurements of a run folder, each read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from streamline_bench.errors import SamplesError
from streamline_bench.report.run_file import RUN_FILE, NoiseRun, RunFile, RunRow, read_run_file
from streamline_bench.stability.metrics import as_grades
from streamline_bench.stability.over_tasks import leaf_tasks
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples
from streamline_bench.throughput.speed import Speed, ThroughputFigures, read_figures


class Reading:
    """Reads the evaluations and measurements of a run, each once."""

    def __init__(
        self,
        run: RunFile,
        homes: Mapping[str, Path],
        given: Mapping[str, Samples],
        progress: bool,
        *,
        graded: Sequence[str] = (),
    ) -> None:
        self.not_read: dict[str, str] = {}
        self._run = run
        self._homes = homes
        self._graded = graded
        self._samples = {label: as_grades(each, graded) for label, each in given.items()}
        self._progress = progress
        self._figures: dict[Path, Mapping[str, ThroughputFigures]] = {}
        for samples in given.values():
            self._note(samples)

    def home(self, row: RunRow) -> Path:
        """What the paths of a row are relative to."""
        return self._homes[row.label]

    def row(self, row: RunRow) -> Samples:
        """The answers of a row to what the run asks."""
        if row.label not in self._samples:
            self._samples[row.label] = self._read(row, self.home(row))
        return self._samples[row.label]

    def forget(self, row: RunRow) -> None:
        """Free a row's answers."""
        self._samples.pop(row.label, None)

    def noise(self, noise: NoiseRun, home: Path) -> Samples:
        """The answers of the dense model when it was asked again."""
        return self._read(noise, home)

    def speed(self, row: RunRow) -> Speed | None:
        """The speed of a row, where it was measured."""
        file = row.throughput or self._run.throughput
        if file is None:
            return None
        path = inside(self.home(row), file)
        if path not in self._figures:
            self._figures[path] = read_figures(path)
        found = self._figures[path].get(row.measured_as or row.label)
        return Speed(**found.model_dump(exclude={"label"})) if found else None

    def _read(self, row: RunRow | NoiseRun, home: Path) -> Samples:
        parts = [self._part(row, home, name) for name in (row.eval or "", *row.more)]
        samples = parts[0].joined(parts[1:])
        groups = samples.info.groups
        gone = {task for name in self._run.tasks_left_out for task in leaf_tasks(name, groups)}
        asked = {task for name in self._run.tasks for task in leaf_tasks(name, groups)}
        samples = samples.without(gone - asked)
        self._note(samples)
        return as_grades(samples, self._graded)

    def _part(self, row: RunRow | NoiseRun, home: Path, name: str) -> Samples:
        """One evaluation, without the tasks that were asked with other settings since."""
        samples = load_samples(inside(home, name), run=row.label, progress=self._progress)
        again, groups = row.asked_again.get(name, ()), samples.info.groups
        return samples.without({leaf for task in again for leaf in leaf_tasks(task, groups)})

    def _note(self, samples: Samples) -> None:
        for name, why in samples.info.left_out.items():
            self.not_read[f"{samples.info.run}: {name}"] = why


def inside(folder: Path, relative: str) -> Path:
    path = folder / relative
    if not path.resolve().is_relative_to(folder.resolve()):
        raise SamplesError(
            f"{folder / RUN_FILE}: '{relative}' lies outside the run folder; move it into the "
            "folder."
        )
    return path


def row_answers(folder: Path, *, progress: bool = True) -> Callable[[str], Samples | None]:
    """Return a function: label of a row of a run -> its answers, read when asked for.

    Raises:
        SamplesError: it is not the folder of a finished run; the function, if an evaluation is
            missing or damaged.
    """
    run = read_run_file(folder)
    rows = {row.label: row for row in run.rows}
    reading = Reading(run, dict.fromkeys(rows, folder), {}, progress)

    def answers(label: str) -> Samples | None:
        samples = reading.row(rows[label])
        reading.forget(rows[label])
        return samples

    return answers
