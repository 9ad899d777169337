"""``run.json``: the rows of a run folder, each with its evaluation and its checkpoint.

::

    <folder>/run.json                        written last: its presence means the run is whole
    <folder>/<label>/eval/...                what lm_eval wrote (with --log_samples)
    <folder>/<label>/divergence.json         next-token distributions against the dense model's
    <folder>/<label>/checkpoint/             streamline.json, similarity.json, training curves
    <folder>/throughput/throughput.json      tokens per second, where they were measured
    <folder>/leaderboard.{json,csv,md,html}  made from the above

``write_run_file(folder, RunFile(dense="dense", rows=[RunRow(...)]))``, then
``build_report(folder)``, which returns the path of ``leaderboard.html``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from streamline_bench.core.files import atomic_write_text, read_json, validated
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.errors import SamplesError

RUN_FILE = "run.json"


class RunRow(Frozen):
    """One row of a comparison.

    Attributes:
        label: name of the row, unique in the run.
        eval: folder with the evaluation's output, relative to the run folder and inside it; None
            where there is none.
        more: folders with further evaluations of the same row, of other tasks.
        asked_again: of such a folder -> tasks that were asked with other settings since; their
            answers there are not read.
        checkpoint: the checkpoint's folder (relative to the run folder, or absolute), None for a
            model that was not made here.
        recipe: the recipe it was made with; None to take the checkpoint's own.
        divergence: file with a :class:`~streamline_bench.stability.comparison.TokenDivergence`,
            relative to the run folder and inside it; None where none was measured.
        seconds: wall-clock seconds by stage, e.g. ``{"compress": 41.0, "evaluate": 12.5}``.
        failed: why the row has no result, in a sentence; it is shown with that reason.
        scored_with: labels of the rows that share their lower layers with this one, itself
            included; empty where none does.
        scored_alone: why the row shares no layer with the dense row or with any other.
        dense: it is a dense model, with which others are compared.
        reference: label of the dense row that it is compared with; None: the run's.
        same_as: label of the row that has the same weights and is shown for both.
        made_elsewhere: of a checkpoint that was not made here: name, revision, how it is loaded,
            hashes and sizes.
        group: label of the row before axes (sizes, seeds, calibrations, models) spanned it.
        axes: axis -> value of this row.
        bytes: of the files of its weights.
        memory: bytes of weights, cache and one pass for the sequences of the run's target.
        throughput: the ``throughput.json`` with its speed, relative to the run folder and inside
            it; None: the run's, if it has one.
        measured_as: what the row is called there, if not by its label.
        published: numbers of the literature for this very model.
        not_compared: what cannot be compared with the dense model -> why.
    """

    label: str = Field(min_length=1)
    eval: str | None = None
    more: list[str] = Field(default_factory=list)
    asked_again: dict[str, list[str]] = Field(default_factory=dict)
    checkpoint: str | None = None
    recipe: dict[str, Any] | None = None
    divergence: str | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    failed: str | None = Field(default=None, min_length=1)
    scored_with: list[str] = Field(default_factory=list)
    scored_alone: str | None = None
    dense: bool = False
    reference: str | None = None
    same_as: str | None = None
    made_elsewhere: dict[str, Any] | None = None
    group: str | None = None
    axes: dict[str, Any] = Field(default_factory=dict)
    bytes: int | None = None
    memory: int | None = None
    throughput: str | None = None
    measured_as: str | None = None
    published: list[dict[str, Any]] = Field(default_factory=list)
    not_compared: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _result_or_reason(self) -> RunRow:
        if self.eval is None and self.failed is None:
            raise ValueError(f"the row '{self.label}' has neither 'eval' nor 'failed'")
        return self


class NoiseRun(Frozen):
    """The dense model evaluated once more, at another batch size, dtype or engine.

    Attributes:
        label: what was different, e.g. ``batch size 1``.
        eval: folder with that evaluation's output, relative to the run folder and inside it.
        more: further ones, of other tasks.
        asked_again: as of a :class:`RunRow`.
    """

    label: str = Field(min_length=1)
    eval: str
    more: list[str] = Field(default_factory=list)
    asked_again: dict[str, list[str]] = Field(default_factory=dict)


class RunFile(Frozen):
    """``run.json``: which rows a run has and how they were made.

    Attributes:
        dense: label of the row that the others are compared with.
        commands: command lines that made the run, for the reader to repeat.
        versions: package -> version, in addition to what the evaluations record.
        title: heading of the report.
        throughput: the run's ``throughput.json``, relative to the run folder and inside it.
        noise: the dense model's repeated evaluations, from which the noise floor is read.
        failed_jobs: job -> reason, for requested work other than the rows that failed.
        not_compared: task -> why no row was evaluated on it.
        used: settings of the dense row's evaluation, as the harness recorded them.
        ignored_options: a sentence for each option that the harness did not follow.
        tasks: what was asked for, as it was asked; empty: everything that was answered.
        tasks_left_out: what was answered as well, and is not shown.
        metrics: task or group -> the metric that judges it, in place of its own.
        pairs: task with free answers -> the one that asks the same and gives choices.
        target: what the sizes of rows were solved for, in words.
        fronts: show which rows are on the Pareto fronts.
        text: names the text of the divergences, and how it was read.
    """

    schema_version: Literal[1] = 1
    dense: str
    rows: list[RunRow] = Field(min_length=1)
    commands: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    title: str = "streamline-bench report"
    throughput: str | None = None
    noise: list[NoiseRun] = Field(default_factory=list)
    failed_jobs: dict[str, str] = Field(default_factory=dict)
    not_compared: dict[str, str] = Field(default_factory=dict)
    used: dict[str, Any] = Field(default_factory=dict)
    ignored_options: list[str] = Field(default_factory=list)
    tasks: list[str] = Field(default_factory=list)
    tasks_left_out: list[str] = Field(default_factory=list)
    metrics: dict[str, str] = Field(default_factory=dict)
    pairs: dict[str, str] = Field(default_factory=dict)
    target: str | None = None
    fronts: bool = False
    text: str | None = None

    @model_validator(mode="after")
    def _labels(self) -> RunFile:
        labels = [row.label for row in self.rows]
        if len(set(labels)) != len(labels):
            raise ValueError(f"row labels must be unique, these are not: {labels}")
        if self.dense not in labels:
            raise ValueError(f"the dense row '{self.dense}' is not among the rows {labels}")
        again = [run.label for run in self.noise]
        if len(set(again)) != len(again):
            raise ValueError(f"noise labels must be unique, these are not: {again}")
        return self


def write_run_file(folder: Path, run: RunFile) -> None:
    """Write ``run.json`` atomically; call it after everything it names is there.

    Raises:
        OutputError: the folder is not writable.
    """
    atomic_write_text(Path(folder) / RUN_FILE, run.model_dump_json(indent=2) + "\n")


def read_run_file(folder: Path) -> RunFile:
    """Read ``run.json``.

    Raises:
        SamplesError: it is missing, damaged or of another schema version.
    """
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        raise SamplesError(
            f"'{folder}' has no {RUN_FILE}; give the folder of a finished run (the same command "
            "again continues an unfinished one)."
        )
    advice = "make the run again"
    payload = read_json(path, SamplesError, advice)
    return validated(RunFile, payload, str(path), newest=1, error=SamplesError, advice=advice)
