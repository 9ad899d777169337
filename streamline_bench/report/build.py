"""From a run folder to its report: evaluations are compared, every view is written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import ValidationError
from tqdm import tqdm

from streamline_bench.core.checkpoint.folder import Manifest, read_manifest
from streamline_bench.core.files import atomic_write_text
from streamline_bench.errors import CheckpointError, OutputError, SamplesError
from streamline_bench.report.leaderboard import (
    Flip,
    Leaderboard,
    Procedure,
    Provenance,
    Row,
    TaskScore,
    to_json,
)
from streamline_bench.report.provenance import (
    provenance,
    published_numbers,
    read_checkpoint,
    task_data,
)
from streamline_bench.report.run_file import RUN_FILE, NoiseRun, RunFile, RunRow, read_run_file
from streamline_bench.report.standing import FOLDED_AXES, Answers, answers_of, standing
from streamline_bench.stability.align import AlignedPairs, align
from streamline_bench.stability.compare_answers import compare_pairs
from streamline_bench.stability.comparison import Comparison, Estimate, TokenDivergence
from streamline_bench.stability.noise import above_noise, noise_floor
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings
from streamline_bench.throughput.record import Speed, read_figures
from streamline_bench.version import __version__

_PROMPT_CHARACTERS = 900  # of a flip
_TEXT_CHARACTERS = 400


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
    progress: bool = True,
) -> Leaderboard:
    """Compare every row of a run with the dense one. Each is read and aligned once.

    Args:
        folder: what the paths in ``run`` are relative to.
        samples: label -> answers of rows that were read already.
        settings: how rows are compared; by default as ``streamline-bench stability`` does.

    Raises:
        SamplesError: an evaluation or the throughput is missing or damaged, or the dense row
            failed.
        ComparisonError: rows were evaluated differently.
    """
    settings = settings or Settings()
    given = samples or {}

    def answers(row: RunRow | NoiseRun) -> Samples:
        return load_samples(_inside(folder, row.eval or ""), run=row.label, progress=progress)

    dense = given.get(run.dense) or answers(_dense_row(run))
    # Of the dense run against itself only accuracies are shown: no need to draw.
    itself = compare_pairs(align(dense, dense), replace(settings, draws=2))
    settings = replace(settings, quantity=itself.quantity)
    # Without verdicts nothing flips, so that there is no floor of flips either.
    again = [answers(noise) for noise in run.noise] if itself.tasks else []
    floor = noise_floor(dense, again, settings=settings) if again else None
    figures = read_figures(_inside(folder, run.throughput)) if run.throughput else {}
    speed = {name: Speed(**each.model_dump(exclude={"label"})) for name, each in figures.items()}
    rows = []
    answered: dict[str, Answers] = {}
    read = [dense, *again]
    for row in tqdm(
        run.rows, desc="Compared rows", unit="row", delay=2, leave=False, disable=not progress
    ):
        if row.failed is not None or row.eval is None:
            made = _failed_row(row, folder)
        elif row.label == run.dense:
            made = _row(dense, itself, row, folder, is_dense=True)
        else:
            read.append(given.get(row.label) or answers(row))
            pairs = align(dense, read[-1])
            result = compare_pairs(pairs, settings)
            counted = [task.task for task in result.tasks if task.p_holm is not None]
            spanned = bool(getattr(row, "axes", {}).keys() & set(FOLDED_AXES))
            answered[row.label] = answers_of(pairs, counted, settings, stable=spanned)
            result = above_noise(result, floor) if floor is not None else result
            made = _row(read[-1], result, row, folder, is_dense=False)
            made = made.model_copy(update={"worst_flips": worst_flips(pairs, settings.verdict)})
        rows.append(made.model_copy(update={"throughput": speed.get(row.label)}))
    rows = _with_original_size(rows)
    stood = standing(rows, answered, settings)
    return Leaderboard(
        title=run.title,
        dense=run.dense,
        method=Procedure(**settings.used()),
        rows=rows,
        ranks=stood.ranks,
        folded=stood.folded,
        neighbours=stood.neighbours,
        contests=stood.contests,
        noise=floor,
        not_compared={**itself.not_compared, **run.not_compared},
        commands=run.commands,
        versions={"streamline-bench": __version__, **run.versions},
        failed_jobs=run.failed_jobs,
        ignored_options=run.ignored_options,
        not_read={
            f"{one.info.run}: {name}": why
            for one in read
            for name, why in one.info.left_out.items()
        },
    )


def _inside(folder: Path, relative: str) -> Path:
    path = folder / relative
    if not path.resolve().is_relative_to(folder.resolve()):
        raise SamplesError(
            f"{folder / RUN_FILE}: '{relative}' lies outside the run folder; move it into the "
            "folder."
        )
    return path


def _dense_row(run: RunFile) -> RunRow:
    row = next(row for row in run.rows if row.label == run.dense)
    if row.failed is not None:
        raise SamplesError(
            f"The dense row '{run.dense}' has no result ({row.failed}), so there is nothing to "
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
    return Row(
        label=samples.info.run,
        is_dense=is_dense,
        **{"parameters": parameters, **_made(recipe, manifest)},
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
        divergence=_divergence(_inside(folder, source.divergence)) if source.divergence else None,
        other_metrics=_other_metrics(samples, result),
        **artefacts,
        published=published_numbers(
            recipe,
            _accuracies(samples, result),
            stability=result.macro.stability if result.macro else None,
            retention=result.macro.retention if result.macro else None,
        ),
        provenance=provenance(samples.info, manifest, recipe or None),
    )


def _made(recipe: Mapping[str, Any], manifest: Manifest | None) -> dict[str, Any]:
    """What recipe and manifest say of a row, as its fields."""
    fields = {
        "title": str(recipe.get("title") or ""),
        "method": recipe.get("method"),
        "replacement": (recipe.get("replacement") or {}).get("kind"),
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
            data=task_data(samples.info, task.task),
        )
        for task in result.tasks
    ]


def _other_metrics(samples: Samples, result: Comparison) -> dict[str, dict[str, float]]:
    """Aggregated numbers of tasks that have no verdicts, as the harness gives them."""
    return {
        task: {
            name.split(",")[0]: float(value)
            for name, value in samples.info.results.get(task, {}).items()
            if "," in name and "_stderr" not in name and isinstance(value, int | float)
        }
        for task in result.not_compared
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
        is_dense=False,
        failed=source.failed or "no evaluation",
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


def _with_original_size(rows: list[Row]) -> list[Row]:
    """The dense row has no manifest; the rows that were made from it know its size."""
    known = next((row for row in rows if row.parameters_before is not None), None)
    if known is None:
        return rows
    size = {"parameters": known.parameters_before, "layers": known.layers_before}
    return [row.model_copy(update=size) if row.is_dense else row for row in rows]


def _divergence(path: Path) -> TokenDivergence:
    try:
        return TokenDivergence.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = " ".join(str(error).split())[:160]
        raise SamplesError(f"{path} cannot be read ({first}); make the run again.") from None


def worst_flips(pairs: AlignedPairs, verdict: str, limit: int = 8) -> list[Flip]:
    """Return at most ``limit`` answers that were right in the dense run and are wrong now.

    Choices come first, by how far the share of the right choice fell; then generated answers in
    the order of the documents, at least two of them where there are any. Of a task with several
    filters only the first one counts, so that no document is listed twice.
    """
    right = pairs.dense[verdict].fillna(False).to_numpy(dtype=np.bool_)
    wrong = (~pairs.pruned[verdict].fillna(True)).to_numpy(dtype=np.bool_)
    first = pairs.dense["task"].map(pairs.first_filters)
    index = np.flatnonzero(right & wrong & (pairs.dense["filter"] == first).to_numpy(np.bool_))
    drops = _drops(pairs, index)
    sure = sorted(
        (place for place, drop in drops.items() if drop is not None),
        key=lambda place: -(drops[place] or 0.0),
    )
    others = [place for place, drop in drops.items() if drop is None]
    kept = min(len(others), max(2, limit - len(sure)))
    places = [*sure[: limit - kept], *others[:kept]]
    before, after = (frame.iloc[places].itertuples() for frame in (pairs.dense, pairs.pruned))
    return [
        _flip(dense, pruned, drops[place])
        for place, dense, pruned in zip(places, before, after, strict=True)
    ]


def _drops(pairs: AlignedPairs, index: npt.NDArray[np.intp]) -> dict[int, float | None]:
    """Row -> by how much the share of the right choice fell; None where there are no choices."""
    columns = [
        frame[name].to_numpy()[index]
        for frame, name in (
            (pairs.dense, "gold"),
            (pairs.dense, "loglikelihoods"),
            (pairs.pruned, "loglikelihoods"),
        )
    ]
    drops: dict[int, float | None] = {}
    for place, value, dense, pruned in zip(index.tolist(), *columns, strict=True):
        gold, before, after = _index(value), _shares(dense), _shares(pruned)
        drops[place] = None
        if gold is not None and before is not None and after is not None:
            drops[place] = round(before[gold] - after[gold], 4)
    return drops


def _flip(dense: Any, pruned: Any, drop: float | None) -> Flip:
    """From one row of either table, as named tuples."""
    before, after = _shares(dense.loglikelihoods), _shares(pruned.loglikelihoods)
    choices = dense.choices
    has_choices = isinstance(choices, list) and len(choices) > 1
    return Flip(
        task=dense.task,
        doc_id=int(dense.doc_id),
        prompt=_end(dense.prompt),
        choices=[_start(choice) for choice in choices] if has_choices else None,
        gold=_index(dense.gold),
        target=_start(dense.target),
        dense_choice=_index(dense.prediction),
        pruned_choice=_index(pruned.prediction),
        dense_shares=before if has_choices else None,
        pruned_shares=after if has_choices else None,
        dense_text=_text(dense.text),
        pruned_text=_text(pruned.text),
        drop=drop,
    )


def _index(value: Any) -> int | None:
    return None if pd.isna(value) else int(value)


def _text(value: Any) -> str | None:
    return _start(value) if isinstance(value, str) else None


def _shares(loglikelihoods: Any) -> list[float] | None:
    if not isinstance(loglikelihoods, list) or len(loglikelihoods) < 2:
        return None
    values = np.exp(np.array(loglikelihoods) - max(loglikelihoods))
    return [round(float(value), 4) for value in values / values.sum()]


def _start(text: str) -> str:
    return text if len(text) <= _TEXT_CHARACTERS else f"{text[:_TEXT_CHARACTERS]} […]"


def _end(text: str) -> str:
    """The end of a prompt is the question; few-shot examples come before it."""
    return text if len(text) <= _PROMPT_CHARACTERS else f"[…] {text[-_PROMPT_CHARACTERS:]}"
