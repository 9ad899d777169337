"""Several runs that answered the same questions, as one board.

Rows are told apart by what they answered with: the same label with the same weights is one row;
other weights under a label that is taken get the name of their run as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamline_bench.errors import ComparisonError, SamplesError
from streamline_bench.report.build import build_leaderboard
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.run_file import RunFile, RunRow, read_run_file


def merged_leaderboard(folders: Sequence[Path], *, progress: bool = True) -> Leaderboard:
    """Return the board of all rows of several run folders.

    The first run's dense row is the one that rows are compared with, unless they come from another.

    Raises:
        ComparisonError: the runs were asked different questions; the first difference is named.
        SamplesError: a folder is not that of a finished run.
    """
    runs = [(folder, read_run_file(folder)) for folder in folders]
    first = runs[0][1]
    for folder, run in runs[1:]:
        _same_questions(folders[0], first, folder, run)
    merging = _Merging(runs[0][1].dense)
    for folder, run in runs:
        merging.add(folder, run)
    noise = next(((f, r.noise) for f, r in runs if r.noise and merging.is_usual(f, r)), None)
    run = first.model_copy(
        update={
            "rows": merging.with_company(),
            "commands": list(dict.fromkeys(c for _, run in runs for c in run.commands)),
            "versions": _versions(run.versions for _, run in runs),
            "throughput": None,
            "noise": noise[1] if noise else [],
            "failed_jobs": {k: v for _, run in runs for k, v in run.failed_jobs.items()},
            "not_compared": {k: v for _, run in runs for k, v in run.not_compared.items()},
            "tasks_left_out": list(
                dict.fromkeys(task for _, run in runs for task in run.tasks_left_out)
            ),
        }
    )
    run = RunFile.model_validate(run.model_dump())
    home = noise[0] if noise else folders[0]
    return build_leaderboard(run, home, homes=merging.homes, progress=progress)


def _same_questions(here: Path, first: RunFile, there: Path, run: RunFile) -> None:
    one, other = set(first.tasks), set(run.tasks)
    if one and other and one != other:
        only = sorted(one ^ other)[0]
        owner, without = (here, there) if only in one else (there, here)
        raise ComparisonError(
            f"{owner} was asked '{only}' and {without} was not; ask both the same tasks (the same "
            "command with these --tasks does only what is new)."
        )
    if first.text and run.text and first.text != run.text:
        raise ComparisonError(
            f"{here} and {there} were compared on different texts, or on different parts of one; "
            "give both the same --text."
        )
    if first.metrics != run.metrics:
        raise ComparisonError(
            f"{here} is judged by {first.metrics or 'the metrics of its tasks'} and {there} by "
            f"{run.metrics or 'those of its tasks'}; give both the same --metric (the same command "
            "with it only makes the report again)."
        )
    if first.pairs != run.pairs:
        raise ComparisonError(
            f"{here} pairs tasks as {first.pairs or 'they say'} and {there} as "
            f"{run.pairs or 'they say'}; give both the same --pair (the same command with it only "
            "makes the report again)."
        )


def _versions(given: Iterable[Mapping[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for versions in given:
        for name, version in versions.items():
            known = found.get(name, version)
            new = version not in known.split(" and ")
            found[name] = f"{known} and {version}" if new else known
    return found


class _Merging:
    """Collects the rows of one run after the other.

    Attributes:
        homes: label -> the folder that the row's paths are relative to.
    """

    def __init__(self, dense: str) -> None:
        self.homes: dict[str, Path] = {}
        self._dense = dense
        self._rows: list[RunRow] = []
        self._weights: dict[str, str] = {}
        self._called: dict[tuple[Path, str], str] = {}

    def add(self, folder: Path, run: RunFile) -> None:
        """Add the rows of a run that are not there yet."""
        rows = sorted(run.rows, key=lambda row: not (row.dense or row.label == run.dense))
        added: dict[str, RunRow] = {}
        for row in rows:
            label = self._label(folder, row)
            self._called[folder, row.label] = label
            if label not in self.homes:
                self.homes[label] = folder
                self._weights[label] = _weights(folder, row)
                added[row.label] = row
        for row in run.rows:
            if row.label in added:
                self._rows.append(self._renamed(folder, run, row))

    def is_usual(self, folder: Path, run: RunFile) -> bool:
        """Whether the dense row of a run is that of the board."""
        return self._called[folder, run.dense] == self._dense

    def with_company(self) -> list[RunRow]:
        """Return the rows; those that share layers with one row share them with each other."""
        groups: list[set[str]] = []
        for row in self._rows:
            together = set(row.scored_with)
            apart = []
            for group in groups:
                if group & together:
                    together |= group
                else:
                    apart.append(group)
            groups = [*apart, together] if together else apart
        company = {label: group for group in groups for label in group}
        order = [row.label for row in self._rows]
        return [
            row.model_copy(
                update={
                    "scored_with": [each for each in order if each in company.get(row.label, ())]
                }
            )
            for row in self._rows
        ]

    def _label(self, folder: Path, row: RunRow) -> str:
        weights = _weights(folder, row)
        if self._weights.get(row.label, weights) == weights:
            return row.label
        named = f"{row.label}-{folder.resolve().name}"
        number = 2
        while self._weights.get(named, weights) != weights:
            named, number = f"{row.label}-{folder.resolve().name}-{number}", number + 1
        return named

    def _renamed(self, folder: Path, run: RunFile, row: RunRow) -> RunRow:
        def called(label: str) -> str:
            return self._called.get((folder, label), label)

        dense = row.dense or row.label == run.dense
        reference = None if dense else called(row.reference or run.dense)
        label = called(row.label)
        changes: dict[str, Any] = {
            "label": label,
            "dense": dense,
            "reference": reference,
            "throughput": row.throughput or run.throughput,
            "measured_as": row.measured_as or row.label,
            "scored_with": [called(each) for each in row.scored_with],
            "same_as": called(row.same_as) if row.same_as else self._twin(label, reference, dense),
        }
        return row.model_copy(update=changes)

    def _twin(self, label: str, reference: str | None, dense: bool) -> str | None:
        """The row of an earlier run that has the same weights."""
        if dense:
            return None
        for row in self._rows:
            same = self._weights[row.label] == self._weights[label] and not row.same_as
            if same and row.failed is None and (row.dense or row.reference == reference):
                return row.label
        return None


def _weights(folder: Path, row: RunRow) -> str:
    """Name what answered: its weights and how they were loaded; a row without answers by itself."""
    if row.eval is None:
        return json.dumps(["failed", row.label, row.recipe], sort_keys=True, default=str)
    found = sorted((folder / row.eval).rglob("results_*.json"), key=lambda path: path.name)
    if not found:
        return f"{folder.resolve()}/{row.eval}"
    try:
        config = json.loads(found[-1].read_text(encoding="utf-8")).get("config", {})
    except (OSError, ValueError):
        raise SamplesError(f"{found[-1]} cannot be read; make the run again.") from None
    weights = (config.get("streamline") or {}).get("weights_sha256")
    return json.dumps([weights or f"{folder.resolve()}/{row.eval}", config.get("model_dtype")])
