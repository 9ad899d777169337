"""Evaluated runs -> one validated leaderboard, the source of every view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from streamline_bench.errors import SamplesError
from streamline_bench.report.board.failed_row import failed_row
from streamline_bench.report.board.flips import worst_flips
from streamline_bench.report.board.provenance import provenance, read_checkpoint
from streamline_bench.report.board.published import published_numbers
from streamline_bench.report.data.datasets import task_data
from streamline_bench.report.data.schema import Leaderboard, Method, Row, TaskScore
from streamline_bench.stability.align import align
from streamline_bench.stability.compare_answers import compare
from streamline_bench.stability.comparison import Comparison, Estimate, NoiseFloor, TokenDivergence
from streamline_bench.stability.noise import above_noise, noise_floor
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings
from streamline_bench.throughput.speed import Speed, read_figures

__all__ = ["RowSource", "build_leaderboard", "read_divergence", "read_throughput"]


@dataclass(frozen=True)
class RowSource:
    """What is known of a row beyond its evaluation; ``failed`` says why it has no result."""

    checkpoint: Path | None = None
    recipe: dict[str, Any] | None = None
    divergence: Path | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    failed: str | None = None
    scored_with: Sequence[str] = ()
    scored_alone: str | None = None


def build_leaderboard(
    runs: Mapping[str, Path | None],
    dense: str,
    *,
    sources: Mapping[str, RowSource] | None = None,
    throughput: Path | None = None,
    noise: Mapping[str, Path] | None = None,
    settings: Settings | None = None,
    title: str = "streamline-bench report",
    commands: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
    failed_jobs: Mapping[str, str] | None = None,
    not_compared: Mapping[str, str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare every run with the dense one and return the leaderboard as plain data.

    Args:
        runs: label -> evaluation (lm-eval output folder or samples Parquet), in the order of the
            rows; None for a row that failed, whose reason its source tells.
        dense: label of the run that the others are compared with.
        sources: label -> checkpoint, recipe and timings, where known.
        throughput: a ``throughput.json``; its figures go to the rows of the same labels.
        noise: label -> evaluation of the dense model, made again.
        failed_jobs: job -> why it gave nothing, for jobs without which every row has its result.
        not_compared: task -> why no run was asked it.

    Returns:
        JSON-ready data of :class:`streamline_bench.report.data.schema.Leaderboard`.

    Raises:
        SamplesError: a run cannot be read, or ``dense`` is not among them or failed.
        ComparisonError: runs were not asked the same.
    """
    sources = sources or {}
    settings = settings or Settings()
    reference = _load_dense(runs, dense, sources, progress)
    # Of the dense run against itself only accuracies are shown: no need to draw.
    itself = compare(reference, reference, settings=replace(settings, draws=2))
    settings = replace(settings, quantity=itself.quantity)
    # Without verdicts nothing flips, so that there is no floor of flips either.
    floor = _noise_floor(reference, noise or {}, settings, progress) if itself.tasks else None
    speed = read_throughput(throughput)
    rows = []
    for label, path in tqdm(
        runs.items(), desc="Compared rows", unit="row", delay=2, leave=False, disable=not progress
    ):
        source = sources.get(label, RowSource())
        if path is None:
            row = failed_row(label, source.failed, source.recipe, source.checkpoint, source.seconds)
        elif label == dense:
            row = _row(reference, itself, source, is_dense=True)
        else:
            samples = load_samples(path, run=label, progress=progress)
            row = _compared_row(reference, samples, source, settings, floor)
        rows.append(row.model_copy(update={"throughput": speed.get(label)}))
    board = Leaderboard(
        title=title,
        dense=dense,
        method=_method(settings, itself),
        rows=_with_original_size(rows),
        noise=floor,
        not_compared={**itself.not_compared, **(not_compared or {})},
        commands=list(commands),
        versions={**_versions(), **(versions or {})},
        failed_jobs=dict(failed_jobs or {}),
    )
    return board.model_dump(mode="json")


def _load_dense(
    runs: Mapping[str, Path | None], dense: str, sources: Mapping[str, RowSource], progress: bool
) -> Samples:
    if dense not in runs:
        raise SamplesError(f"The dense run '{dense}' is not among the runs: {', '.join(runs)}.")
    path = runs[dense]
    if path is None:
        reason = sources[dense].failed if dense in sources else None
        raise SamplesError(
            f"The dense row '{dense}' has no result ({reason or 'no evaluation'}), so there is "
            "nothing to compare with; mend that and make the run again."
        )
    return load_samples(path, run=dense, progress=progress)


def _compared_row(
    reference: Samples,
    samples: Samples,
    source: RowSource,
    settings: Settings,
    floor: NoiseFloor | None,
) -> Row:
    result = compare(reference, samples, settings=settings)
    if floor is not None:
        result = above_noise(result, floor)
    flips = worst_flips(align(reference, samples), settings.verdict, _first_filters(reference))
    row = _row(samples, result, source, is_dense=False)
    return row.model_copy(update={"worst_flips": flips})


def _noise_floor(
    reference: Samples, noise: Mapping[str, Path], settings: Settings, progress: bool
) -> NoiseFloor | None:
    if not noise:
        return None
    again = [load_samples(path, run=label, progress=progress) for label, path in noise.items()]
    return noise_floor(reference, again, settings=settings)


def _method(settings: Settings, itself: Comparison) -> Method:
    return Method(
        mode=settings.mode,
        ddof=settings.spread_ddof,
        quantity=settings.spread_quantity,
        verdict=settings.verdict,
        confidence=settings.confidence,
        draws=settings.draws,
        seed=settings.seed,
        margin=settings.margin,
    )


def _versions() -> dict[str, str]:
    from streamline_bench.version import __version__

    return {"streamline-bench": __version__}


def _row(samples: Samples, result: Comparison, source: RowSource, *, is_dense: bool) -> Row:
    facts = read_checkpoint(source.checkpoint)
    manifest = facts.manifest
    recipe = source.recipe or (manifest.recipe if manifest else None) or {}
    parameters = samples.info.config.get("model_num_parameters")
    evaluation = {"evaluate": samples.info.seconds} if samples.info.seconds else {}
    shown = None if is_dense else result
    return Row(
        label=samples.info.run,
        is_dense=is_dense,
        title=str(recipe.get("title") or ""),
        method=recipe.get("method"),
        replacement=(recipe.get("replacement") or {}).get("kind"),
        cost=None if is_dense else recipe.get("cost"),
        layers=manifest.layers_after if manifest else None,
        layers_before=manifest.layers_before if manifest else None,
        parameters=manifest.parameters_after if manifest else _count(parameters),
        parameters_before=manifest.parameters_before if manifest else None,
        sparsity_requested=manifest.sparsity_requested if manifest else None,
        sparsity_reached=manifest.sparsity_reached if manifest else None,
        seconds={**evaluation, **(manifest.seconds if manifest else {}), **source.seconds},
        scored_with=list(source.scored_with),
        scored_alone=source.scored_alone,
        accuracy_macro=result.macro.pruned if result.macro else None,
        accuracy_micro=result.micro.pruned if result.micro else None,
        macro=shown.macro if shown else None,
        micro=shown.micro if shown else None,
        tasks=_tasks(samples, result, is_dense),
        groups=list(shown.groups) if shown else [],
        perplexities=list(shown.perplexities) if shown else [],
        generations=list(shown.generations) if shown else [],
        divergence=read_divergence(source.divergence),
        other_metrics=_other_metrics(samples, result),
        scan=facts.scan,
        curve=facts.curve,
        recovery_curve=facts.recovery_curve,
        curve_notes=facts.curve_notes,
        published=published_numbers(
            recipe,
            _accuracies(samples, result),
            stability=result.macro.stability if result.macro else None,
            retention=result.macro.retention if result.macro else None,
        ),
        provenance=provenance(samples.info, manifest, recipe or None),
    )


def _count(value: Any) -> int | None:
    return int(value) if isinstance(value, int) and value > 0 else None


def _first_filters(samples: Samples) -> dict[str, str]:
    return dict(samples.frame.drop_duplicates("task")[["task", "filter"]].to_numpy().tolist())


def _accuracies(samples: Samples, result: Comparison) -> dict[str, Estimate]:
    """Accuracy by task, then by group, as tables of papers name both."""
    first = _first_filters(samples)
    tasks = {task.task: task.pruned for task in result.tasks if first[task.task] == task.filter}
    return tasks | {
        group.group: group.pruned for group in result.groups if group.group not in tasks
    }


def _tasks(samples: Samples, result: Comparison, is_dense: bool) -> list[TaskScore]:
    first = _first_filters(samples)
    data = task_data(samples.info)
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
            data=data.get(task.task),
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


def _with_original_size(rows: list[Row]) -> list[Row]:
    """The dense row has no manifest; the rows that were made from it know its size."""
    known = next((row for row in rows if row.parameters_before is not None), None)
    if known is None:
        return rows
    size = {"parameters": known.parameters_before, "layers": known.layers_before}
    return [row.model_copy(update=size) if row.is_dense else row for row in rows]


def read_divergence(path: Path | None) -> TokenDivergence | None:
    """Return what a ``divergence.json`` holds; None without one.

    Raises:
        SamplesError: the file is missing or damaged.
    """
    if path is None:
        return None
    try:
        return TokenDivergence.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = " ".join(str(error).split())[:160]
        raise SamplesError(f"{path} cannot be read ({first}); make the run again.") from None


def read_throughput(path: Path | None) -> dict[str, Speed]:
    """Return label -> figures of a ``throughput.json``; nothing without one.

    Raises:
        StreamlineBenchError: the file is missing or damaged.
    """
    if path is None:
        return {}
    return {
        label: Speed(**found.model_dump(exclude={"label"}))
        for label, found in read_figures(path).items()
    }
