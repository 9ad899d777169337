"""From a run folder to its report: evaluations are compared, every view is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from streamline_bench.core.checkpoint.folder import Manifest, read_manifest
from streamline_bench.core.files import atomic_write_text
from streamline_bench.errors import CheckpointError, OutputError, SamplesError
from streamline_bench.report.flips import worst_flips
from streamline_bench.report.gains import gains, recipe_parts
from streamline_bench.report.guessing import against_random, given_answer, guessing_levels
from streamline_bench.report.leaderboard import Leaderboard, Procedure, to_json
from streamline_bench.report.provenance import (
    provenance,
    published_numbers,
    read_checkpoint,
    task_data,
)
from streamline_bench.report.reading import Reading, inside
from streamline_bench.report.row import Provenance, Row, SameWeights
from streamline_bench.report.run_file import RunFile, RunRow, read_run_file
from streamline_bench.report.scores import GradeScore, TaskScore, grade_change
from streamline_bench.report.solved import with_solved
from streamline_bench.report.standing import (
    FOLDED_AXES,
    Answers,
    answers_of,
    grades_of,
    standing,
)
from streamline_bench.stability.align import align
from streamline_bench.stability.compare_answers import compare_pairs
from streamline_bench.stability.comparison import Comparison, GradedMetric
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.metrics import with_asked_metrics
from streamline_bench.stability.noise import above_noise, noise_floor
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.texts import MeasuredDivergence
from streamline_bench.version import __version__


def build_report(folder: Path, *, settings: Settings | None = None, progress: bool = True) -> Path:
    """Make the report files of a run folder, in that folder; return ``leaderboard.html``.

    Raises:
        OutputError: the folder is not writable; otherwise as :func:`build_leaderboard`.
    """
    folder = Path(folder)
    board = build_leaderboard(read_run_file(folder), folder, settings=settings, progress=progress)
    return write_report(board, folder)


def write_report(board: Leaderboard, output: Path) -> Path:
    """Write the four files of a report, each atomically, ``leaderboard.html`` last.

    Args:
        output: folder, made if missing; files of an earlier report are replaced.

    Returns:
        The path of ``leaderboard.html``.

    Raises:
        SamplesError: the leaderboard holds a number that is not finite.
        OutputError: the folder cannot be written.
    """
    # The views need Jinja, which a gate that builds a leaderboard does not.
    from streamline_bench.report.views.csv_table import to_csv
    from streamline_bench.report.views.markdown import to_markdown
    from streamline_bench.report.views.page import to_html

    output = Path(output)
    views = {
        "leaderboard.json": to_json(board),
        "leaderboard.csv": to_csv(board),
        "leaderboard.md": to_markdown(board),
        "leaderboard.html": to_html(board),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in views.items():
            atomic_write_text(output / name, text)
    except OSError as error:
        raise OutputError(
            f"The report cannot be written to '{output}' ({error.strerror or error})."
        ) from None
    return output / "leaderboard.html"


def build_leaderboard(
    run: RunFile,
    folder: Path,
    *,
    samples: Mapping[str, Samples] | None = None,
    settings: Settings | None = None,
    homes: Mapping[str, Path] | None = None,
    progress: bool = True,
) -> Leaderboard:
    """Compare every row of a run with its dense one.

    Each is read and aligned once; twice where a metric is 0 or 1 throughout in one row and a grade
    in another: then it is a grade in all.

    Args:
        folder: what the paths in ``run`` are relative to.
        homes: label -> the folder that a row's paths are relative to, if it is another one.
        samples: label -> answers of rows that were read already.
        settings: how rows are compared; by default as ``streamline-bench stability`` does.

    Raises:
        SamplesError: an evaluation or the throughput is missing or damaged, or the dense row
            failed.
        ComparisonError: rows were evaluated differently.
    """
    places = {row.label: folder for row in run.rows} | dict(homes or {})
    settings = settings or Settings()
    settings = replace(
        settings, metrics=settings.metrics or run.metrics, pairs=settings.pairs or run.pairs
    )
    reading = Reading(run, places, samples or {}, progress)
    board = _compared(run, folder, reading, settings, progress)
    if both := _judged_both_ways(board.rows):
        reading = Reading(run, places, samples or {}, progress, graded=both)
        board = _compared(run, folder, reading, settings, progress)
    return board


def _judged_both_ways(rows: Sequence[Row]) -> list[str]:
    """Tasks that one row has verdicts of and another one grades, by the same metric."""
    verdicts = {(task.task, task.filter, task.verdict) for row in rows for task in row.tasks}
    return sorted(
        {
            score.task
            for row in rows
            for score in row.grades
            if score.decides and (score.task, score.filter, score.metric) in verdicts
        }
    )


def _compared(
    run: RunFile, folder: Path, reading: Reading, settings: Settings, progress: bool
) -> Leaderboard:
    dense = reading.row(_dense_row(run, run.dense))
    # Of a dense run against itself only accuracies are shown: no need to draw.
    own = align(dense, dense)
    itself = compare_pairs(own, replace(settings, draws=2))
    settings = replace(settings, quantity=itself.quantity)
    # Without verdicts, grades and texts nothing moves, so that there is no floor either.
    judged = itself.tasks or itself.grades or itself.generations
    again = [reading.noise(noise, folder) for noise in run.noise] if judged else []
    # Tasks that another engine scores may have no floor.
    floor = noise_floor(dense, again, common_only=True, settings=settings) if again else None
    rows = []
    answered: dict[str, Answers] = {}
    graded: dict[str, Answers] = {}
    shown = [row for row in run.rows if row.same_as is None]
    for row in tqdm(
        shown, desc="Compared rows", unit="row", delay=2, leave=False, disable=not progress
    ):
        home = reading.home(row)
        if row.failed is not None or row.eval is None:
            made = _failed_row(row, home)
        elif row.label == run.dense:
            made = _row(dense, itself, row, home, is_dense=True)
        elif row.dense:
            other = reading.row(row)
            align(dense, other)  # rows of several models are on one board if asked the same
            result = compare_pairs(align(other, other), replace(settings, draws=2))
            made = _row(other, result, row, home, is_dense=True)
        else:
            against = _reference(run, row)
            pairs = with_asked_metrics(
                align(reading.row(_dense_row(run, against)), reading.row(row)), settings.metrics
            )
            result = compare_pairs(pairs, settings)
            counted = [task.task for task in result.tasks if task.p_holm is not None]
            spanned = any(
                each.axes.keys() & set(FOLDED_AXES)
                for each in run.rows
                if row.label in (each.label, each.same_as)
            )
            usual = against == run.dense
            if usual:
                answered[row.label] = answers_of(pairs, counted, settings, stable=spanned)
                graded[row.label] = grades_of(pairs, result)
            result = above_noise(result, floor) if floor is not None and usual else result
            made = _row(reading.row(row), result, row, home, is_dense=False)
            flips = worst_flips(pairs, settings.verdict)
            made = made.model_copy(update={"worst_flips": flips})
            reading.forget(row)
        rows.append(made.model_copy(update={"throughput": reading.speed(row)}))
    rows = _with_twins(_with_original_size(rows, run.dense), run.rows)
    rows = [with_solved(row, rows, run.dense) for row in rows]
    stood = standing(rows, answered, settings, graded, with_fronts=run.fronts)
    return Leaderboard(
        title=run.title,
        dense=run.dense,
        method=Procedure(**settings.used()),
        rows=rows,
        ranks=stood.ranks,
        grade_ranks=stood.grade_ranks,
        folded=stood.folded,
        neighbours=stood.neighbours,
        contests=stood.contests,
        guessing=guessing_levels(own, itself, settings),
        against_random=against_random(stood.entries, settings),
        gains=gains(rows, stood.entries, stood.folded, settings),
        target=run.target,
        fronts=stood.fronts,
        noise=floor,
        not_compared={**itself.not_compared, **run.not_compared},
        commands=run.commands,
        versions={"streamline-bench": __version__, **run.versions},
        failed_jobs=run.failed_jobs,
        ignored_options=run.ignored_options,
        not_read=reading.not_read,
    )


def _reference(run: RunFile, row: RunRow) -> str:
    """The label of the dense row that a row is compared with."""
    return row.reference or run.dense


def _dense_row(run: RunFile, label: str) -> RunRow:
    row = next((row for row in run.rows if row.label == label), None)
    if row is None:
        raise SamplesError(f"There is no dense row '{label}'; make the run again.")
    if row.failed is not None:
        raise SamplesError(
            f"The dense row '{label}' has no result ({row.failed}), so there is nothing to "
            "compare with; correct that and make the run again."
        )
    return row


def _row(
    samples: Samples, result: Comparison, source: RunRow, folder: Path, *, is_dense: bool
) -> Row:
    manifest, artefacts = read_checkpoint(folder / source.checkpoint if source.checkpoint else None)
    recipe = source.recipe or (manifest.recipe if manifest else None) or {}
    counted = samples.info.config.get("model_num_parameters")
    parameters = counted if isinstance(counted, int) and counted > 0 else None
    evaluation = {"evaluate": samples.info.seconds} if samples.info.seconds else {}
    shown = None if is_dense else result
    grades = _grades(samples, result, is_dense)
    return Row(
        label=samples.info.run,
        is_dense=is_dense,
        **_said(source),
        **{"parameters": parameters, **_made(recipe, manifest), **_elsewhere(source)},
        cost=None if is_dense else recipe.get("cost"),
        seconds={**evaluation, **(manifest.seconds if manifest else {}), **source.seconds},
        scored_with=source.scored_with,
        scored_alone=source.scored_alone,
        accuracy_macro=result.macro.pruned if result.macro else None,
        accuracy_micro=result.micro.pruned if result.micro else None,
        macro=shown.macro if shown else None,
        micro=shown.micro if shown else None,
        tasks=_tasks(samples, result, is_dense),
        groups=list(shown.groups) if shown else [],
        perplexities=list(shown.perplexities) if shown else [],
        generations=list(shown.generations) if shown else [],
        grades=grades,
        grade_change=grade_change(grades),
        formats=list(shown.formats) if shown else [],
        aggregate_only=result.aggregate_only,
        divergence=_divergence(inside(folder, source.divergence)) if source.divergence else None,
        other_metrics=_other_metrics(samples, result),
        **artefacts,
        published=published_numbers(
            {**recipe, "published": [*(recipe.get("published") or ()), *source.published]},
            _accuracies(samples, result),
            stability=result.macro.stability if result.macro else None,
            retention=result.macro.retention if result.macro else None,
        ),
        provenance=provenance(samples.info, manifest, recipe or None),
    )


def _said(source: RunRow) -> dict[str, Any]:
    """What the run says of a row, as its fields."""
    same = ("reference", "made_elsewhere", "group", "axes", "bytes", "memory", "not_compared")
    return {name: getattr(source, name) for name in same}


def _elsewhere(source: RunRow) -> dict[str, Any]:
    """Sizes of a checkpoint that was not made here, counted from its files."""
    made = source.made_elsewhere or {}
    fields = {name: made.get(name) for name in ("parameters", "layers")}
    return {name: value for name, value in fields.items() if value is not None}


def _made(recipe: Mapping[str, Any], manifest: Manifest | None) -> dict[str, Any]:
    """What recipe and manifest say of a row, as its fields."""
    fields = {
        "title": str(recipe.get("title") or ""),
        "method": recipe.get("method"),
        "replacement": (recipe.get("replacement") or {}).get("kind"),
        "parts": recipe_parts(recipe),
    }
    if manifest is None:
        return fields
    return fields | {
        "layers": manifest.layers_after,
        "layers_before": manifest.layers_before,
        "parameters": manifest.parameters_after,
        "parameters_before": manifest.parameters_before,
        "sparsity_requested": manifest.sparsity_requested,
        "sparsity_reached": manifest.sparsity_reached,
    }


def _accuracies(samples: Samples, result: Comparison) -> dict[str, Estimate]:
    """Accuracy by task, then by group, as tables of papers name both."""
    first = samples.first_filters
    tasks = {task.task: task.pruned for task in result.tasks if first[task.task] == task.filter}
    return tasks | {
        group.group: group.pruned for group in result.groups if group.group not in tasks
    }


def _tasks(samples: Samples, result: Comparison, is_dense: bool) -> list[TaskScore]:
    first = samples.first_filters
    return [
        TaskScore(
            task=task.task,
            filter=task.filter,
            main=first[task.task] == task.filter,
            output_type=task.output_type,
            verdict=task.verdict,
            n=task.n,
            accuracy=task.pruned,
            comparison=None if is_dense else task,
            given=given_answer(samples, task),
            data=task_data(samples.info, task.task),
        )
        for task in result.tasks
    ]


def _grades(samples: Samples, result: Comparison, is_dense: bool) -> list[GradeScore]:
    first = samples.first_filters
    return [
        GradeScore(
            **{name: getattr(found, name) for name in GradedMetric.model_fields},
            main=first[found.task] == found.filter,
            value=found.pruned,
            comparison=None if is_dense else found,
        )
        for found in result.grades
    ]


def _other_metrics(samples: Samples, result: Comparison) -> dict[str, dict[str, float]]:
    """Aggregated numbers of tasks that have no verdicts, as the harness gives them."""
    judged = {task.task for task in result.tasks}
    graded = [found.task for found in result.grades if found.task not in judged]
    return {
        task: {
            name.split(",")[0]: float(value)
            for name, value in samples.info.results.get(task, {}).items()
            if "," in name and "_stderr" not in name and isinstance(value, int | float)
        }
        for task in dict.fromkeys([*result.not_compared, *graded])
    }


def _failed_row(source: RunRow, folder: Path) -> Row:
    """A row without numbers; it has a size where a checkpoint was made before it failed."""
    manifest = None
    # A damaged checkpoint may be the very reason of the failure, which the row names.
    with suppress(CheckpointError):
        manifest = read_manifest(folder / source.checkpoint) if source.checkpoint else None
    recipe = source.recipe or (manifest.recipe if manifest else {})
    return Row(
        label=source.label,
        is_dense=source.dense,
        failed=source.failed or "no evaluation",
        **_said(source),
        **{"sparsity_requested": recipe.get("sparsity"), **_made(recipe, manifest)},
        cost=recipe.get("cost"),
        seconds={**(manifest.seconds if manifest else {}), **source.seconds},
        accuracy_macro=None,
        accuracy_micro=None,
        macro=None,
        micro=None,
        tasks=[],
        provenance=Provenance(
            results_file=None,
            model=None,
            engine=None,
            source=manifest.source.name if manifest else None,
            recipe=dict(recipe) or None,
        ),
    )


def _with_original_size(rows: list[Row], usual: str) -> list[Row]:
    """A dense row has no manifest; the rows that were made from it know its size.

    What was made elsewhere has lost what its dense row has more.
    """
    sizes: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.parameters_before is not None:
            size = {"parameters": row.parameters_before, "layers": row.layers_before}
            sizes.setdefault(row.reference or usual, size)
    sized = [
        row.model_copy(update=sizes.get(row.label, {})) if row.is_dense else row for row in rows
    ]
    dense = {row.label: row for row in sized if row.is_dense}
    return [
        row.model_copy(update=_lost(row, dense[row.reference or usual]))
        if row.made_elsewhere is not None and row.failed is None
        else row
        for row in sized
    ]


def _lost(row: Row, dense: Row) -> dict[str, Any]:
    """How much smaller a checkpoint made elsewhere is than its dense row."""
    if not row.parameters or not dense.parameters:
        return {}
    return {
        "parameters_before": dense.parameters,
        "layers_before": dense.layers,
        "sparsity_reached": 1 - row.parameters / dense.parameters,
    }


def _with_twins(rows: list[Row], sources: Sequence[RunRow]) -> list[Row]:
    """Name the rows that have the same weights with the one that is shown for them."""
    twins: dict[str, list[SameWeights]] = {}
    for source in sources:
        if source.same_as is not None:
            title = str((source.recipe or {}).get("title") or "")
            same = SameWeights(
                label=source.label,
                title=title,
                recipe=source.recipe,
                group=source.group,
                axes=source.axes,
            )
            twins.setdefault(source.same_as, []).append(same)
    return [
        row.model_copy(update={"same_weights": twins[row.label]}) if row.label in twins else row
        for row in rows
    ]


def _divergence(path: Path) -> MeasuredDivergence:
    try:
        return MeasuredDivergence.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = " ".join(str(error).split())[:160]
        raise SamplesError(f"{path} cannot be read ({first}); make the run again.") from None
