"""The tables that commands print: stability, divergence, throughput."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from streamline_bench.report.text import (
    MISSING,
    decimal,
    grade_change,
    grade_mean,
    interval,
    p_value,
    percent,
    points,
    ratio,
    terminal_text,
    with_error,
    with_interval,
)

if TYPE_CHECKING:
    from streamline_bench.stability.comparison import (
        Comparison,
        FormatComparison,
        GradeComparison,
        GroupComparison,
        Overall,
        TaskComparison,
    )
    from streamline_bench.stability.estimate import Estimate
    from streamline_bench.stability.texts import (
        GenerationComparison,
        PerplexityComparison,
        TokenDivergence,
    )
    from streamline_bench.throughput.figures import Latency, Ratio
    from streamline_bench.throughput.record import ModelResult, Point, ThroughputRecord
    from streamline_bench.throughput.served import ServingPoint, Sustained

_MIB = 1 << 20


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table


def stability_table(result: Comparison) -> Table:
    """Return accuracies, stability and flips of every task, with means below."""
    names = ("n", "dense", "pruned", "change\n(Holm's)\nverdict", "stability", "agreement",
             "lost/\ngained", "p\n(Holm's)")  # fmt: skip
    table = _table("Pruned against dense, in %", ("task",), names)
    for task in result.tasks:
        name = task.task if task.filter == "none" else f"{task.task} ({task.filter})"
        table.add_row(*_cells(name, task))
    if result.groups:
        table.add_section()
    for group in result.groups:
        table.add_row(*_group_mean(group))
        table.add_row(*_cells(f"{group.group}, documents", group))
    if len(result.tasks) > 1 and result.macro is not None and result.micro is not None:
        table.add_section()
        table.add_row(*_cells("mean over tasks", result.macro))
        table.add_row(*_cells("all documents", result.micro))
    return table


def _group_mean(group: GroupComparison) -> list[str]:
    """The unweighted mean over the tasks of a group, of which only stability has an interval."""
    dense, pruned = group.macro_dense, group.macro_pruned
    change = None if dense is None or pruned is None else pruned - dense
    return [
        escape(terminal_text(f"{group.group}, mean of {len(group.tasks)} tasks")),
        str(group.n),
        percent(dense),
        percent(pruned),
        points(change),
        escape(_with_interval(group.macro_stability)),
    ]


def _with_interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return percent(None)
    return f"{percent(estimate.value)}\n{interval(estimate)}".strip()


def _cells(name: str, row: TaskComparison | GroupComparison | Overall) -> list[str]:
    difference = row.difference
    verdict: str = "no worse" if row.decision == "no worse than margin" else row.decision or ""
    change, p = [points(row.difference.value), interval(difference, signed=True)], [row.p_value]
    if row.adjusted is not None:
        change.append(interval(row.adjusted, signed=True))
        p.append(row.p_holm)
    excess, above = row.flips_above_noise, ""
    if excess is not None:
        above = f"{points(excess.value)} % above\n{interval(excess, signed=True)}"
    cells = [
        terminal_text(name),
        str(row.n),
        with_error(row.dense),
        with_error(row.pruned),
        "\n".join([*change, verdict]),
        _with_interval(row.stability),
        percent(row.agreement.value),
        f"{row.flips.right_to_wrong}/{row.flips.wrong_to_right}\n{above}",
        "\n".join(map(p_value, p)),
    ]
    return [escape(cell.strip()) for cell in cells]


def grades_table(result: Comparison) -> Table:
    """Return the metrics that are more than right or wrong, those that judge a task first."""
    names = ("n", "dense", "pruned", "change\n(Holm's)\nverdict", "better/\nequal/worse",
             "p\n(Holm's)")  # fmt: skip
    table = _table("Grades (in % of the highest) and other metrics", ("task", "metric"), names)
    for found in sorted(result.grades, key=lambda each: not each.decides):
        table.add_row(*map(escape, _grade_cells(found)))
    return table


def _grade_cells(found: GradeComparison) -> list[str]:
    name = found.task if found.filter == "none" else f"{found.task} ({found.filter})"
    change, p = [grade_change(found)], [p_value(found.p_value)]
    if found.adjusted is not None and found.p_holm is not None:
        change.append(interval(found.adjusted, signed=True))
        p.append(p_value(found.p_holm))
    change.append("no worse" if found.decision == "no worse than margin" else found.decision or "")
    return [
        terminal_text(name),
        terminal_text(found.metric) + ("" if found.higher_is_better else " (lower is better)"),
        str(found.n),
        grade_mean(found, found.dense),
        grade_mean(found, found.pruned),
        "\n".join(change).strip(),
        f"{found.wins}/{found.ties}/{found.losses}",
        "\n".join(p) if found.p_value is not None else MISSING,
    ]


def _perplexity(found: PerplexityComparison) -> str:
    name = f"{terminal_text(found.task)}, perplexity per {found.unit}"
    times = found.ratio
    if found.dense is None or found.pruned is None or times is None:
        return f"{name}: {found.nats_per_unit.value:+.4g} nats."
    ends = "" if times.low is None else f" [{times.low:.4g}, {times.high:.4g}]"
    return f"{name}: {found.dense:.4g}, {found.pruned:.4g}, ratio {times.value:.4g}{ends}."


def _generation(found: GenerationComparison) -> str:
    name = f"{terminal_text(found.task)} ({terminal_text(found.filter)})"
    parted = "" if found.first_word is None else f", the others part at word {found.first_word:g}"
    said = f"{name}: {percent(found.identical.value)} % of the texts are identical{parted}"
    if found.changed_above_noise is not None:
        above = with_interval(found.changed_above_noise, signed=True)
        said += f"; {above} points change above the noise of {percent(found.noise_changed)} %"
    if found.length_ratio is not None:
        said += f"; {ratio(found.length_ratio)} as long"
    for what, counted in (("tokens", found.tokens), ("tokens spent thinking", found.thinking),
                          ("tokens per right answer", found.tokens_per_solved)):  # fmt: skip
        if counted is not None:
            times = f" ({ratio(counted.ratio)})" if counted.ratio else ""
            said += f"; {decimal(counted.dense, 1)} then {decimal(counted.pruned, 1)} {what}{times}"
    for what, change in (("empty", found.empty), ("repeated", found.repetition),
                         ("unfinished", found.unfinished)):  # fmt: skip
        if change is not None and change.pruned + change.dense > 0:
            both = f"{percent(change.dense)} % then {percent(change.pruned)} %"
            said += f"; {what} {both} ({with_interval(change.difference, signed=True)})"
    return f"{said}."


def _format(found: FormatComparison) -> str:
    parts = (("both", "both"), ("choice_only", "choices only"), ("free_only", "free only"),
             ("neither", "neither"))  # fmt: skip
    counts = ", ".join(
        f"{name} {getattr(found.dense, key)} then {getattr(found.pruned, key)}"
        for key, name in parts
    )
    kept = found.kept
    return (
        f"{terminal_text(found.free)} asks what {terminal_text(found.choice)} asks: right in "
        f"{counts}; of {found.dense.both} right in both, {kept.both + kept.choice_only} are kept "
        f"among choices and {kept.both + kept.free_only} freely (p {p_value(found.kept_p)}); "
        f"free answers change by {with_interval(found.gap, signed=True)} points more."
    )


def _how_made(result: Comparison) -> str:
    if not result.tasks and result.grades:
        return (
            f"{100 * result.confidence:g} % intervals and p: documents, or clusters of them, drawn "
            "again. Verdict: by Holm's interval and p, adjusted over the tasks."
        )
    if not result.tasks:
        return (
            "No task has right or wrong answers: no accuracy, flips or stability. Intervals are "
            "over documents."
        )
    return (
        f"Stability: {result.mode}, spread of {result.quantity} over the choices "
        f"(ddof {result.ddof}). {100 * result.confidence:g} % intervals. Change and p: one score "
        "test (McNemar's; Tango's interval), over clusters of documents where there are some. "
        "Verdict: by Holm's interval and p, adjusted over the tasks (over the groups for groups). "
        f"'no worse': the interval of the change excludes a drop of "
        f"{100 * (result.margin or 0):g} points or more."
    )


def stability_notes(result: Comparison) -> str:
    """Return how the figures were made, and what the table has no place for."""
    lines = [_how_made(result)]
    lines += [_perplexity(found) for found in result.perplexities]
    lines += [_generation(found) for found in result.generations]
    lines += [_format(found) for found in result.formats]
    shown = {found.task for found in result.perplexities}
    shown |= {found.task for found in result.generations}
    lines += [
        f"{terminal_text(task)}: {terminal_text(name)} only over all documents "
        f"({terminal_text(reason)})."
        for task, metrics in result.aggregate_only.items()
        for name, reason in metrics.items()
    ]
    lines += [
        f"Not compared: {terminal_text(task)} ({terminal_text(reason)})."
        for task, reason in result.not_compared.items()
        if task not in shown
    ]
    return "\n".join(lines)


def divergence_table(result: TokenDivergence) -> Table:
    """Return both perplexities, and how far the distributions are apart."""
    title = f"{result.tokens} tokens of {result.documents} documents, windows of {result.window}"
    table = _table(title, ("",), ("value", "interval"))
    for name in ("dense", "pruned"):
        value = getattr(result, f"{name}_perplexity")
        shown = "beyond float64" if value is None else f"{value:.4f}"
        table.add_row(f"perplexity, {name}", shown, "")
    for name, found in (
        ("more nats per token", result.nats_per_token),
        ("KL(dense || pruned), nats per token", result.kl),
        ("same first token, share", result.same_top),
    ):
        known = found.low is not None and found.high is not None
        interval = f"[{found.low:.4f}, {found.high:.4f}]" if known else ""
        table.add_row(name, f"{found.value:.4f}", interval)
    return table


def throughput_tables(record: ThroughputRecord) -> Iterator[Table]:
    """Yield the tables that a record fills: batches, served loads, the paper's figures."""
    if record.mode == "serving":
        yield from _serving_tables(record)
        return
    names = "batch|tokens/s|to dense|ideal|of ideal|weights|peak|KV tokens"
    table = _table("Throughput", ("model",), (*names.split("|"),))
    for model in record.models:
        for point in model.points:
            table.add_row(*map(escape, _batch_cells(model, point)))
    yield table
    if record.paper:
        paper = _table("The paper's figures (Llama-2-7B)", ("model",), ("tokens/s", "to dense"))
        for each in record.paper:
            paper.add_row(escape(each.name), f"{each.tokens_per_second:.2f}", f"{each.ratio:.2f}")
        yield paper


def _serving_tables(record: ThroughputRecord) -> Iterator[Table]:
    """The highest load of every model, and latencies at every load."""
    load = record.serving_load
    slo = load.slo if load is not None else None
    if slo is not None:
        title = f"Highest load that keeps {slo.described}"
        names = ("load", "to dense", "goodput", "to dense", "what breaks above")
        table = _table(title, ("model",), names)
        for model in record.models:
            if model.sustained is not None:
                table.add_row(*map(escape, _sustained_cells(model, model.sustained)))
        yield table
    served = [(model, point) for model in record.models for point in model.serving]
    if served or slo is None:
        title = "Serving: milliseconds at p50 / p90 / p99, and mean to dense"
        good = ("goodput",) if slo is not None else ()
        names = ("load", "tokens/s", *good, "TTFT", "TPOT", "ITL", "E2EL")
        table = _table(title, ("model",), names)
        for model, point in served:
            table.add_row(*map(escape, _serving_cells(model, point, bool(good))))
        yield table


def _sustained_cells(model: ModelResult, found: Sustained) -> list[str]:
    name = terminal_text(model.label)
    if found.level is None:
        return [name, "failed", *[MISSING] * 4]
    unit = "in flight" if found.by == "concurrency" else "requests/s"
    limits = "; ".join(dict.fromkeys(found.limit))
    return [
        name,
        f"{found.level:.3g} {unit}",
        _with_ends(found.ratio, "\n") if found.ratio is not None else MISSING,
        MISSING if found.goodput is None else f"{found.goodput:.3g} requests/s",
        _with_ends(found.goodput_ratio, "\n") if found.goodput_ratio is not None else MISSING,
        terminal_text(limits),
    ]


def throughput_notes(record: ThroughputRecord) -> str:
    """Return what the figures count against, where they come from, and every failure."""
    where = record.environment
    clock = "processor seconds" if record.clock == "cpu" else "wall seconds"
    version = f" {where.engine_version}" if where.engine_version else ""
    lines = [
        f"{terminal_text(record.engine)}{terminal_text(version)}, {record.dtype}, "
        f"{terminal_text(where.device_name)}, {where.threads} thread(s); "
        f"{record.workload.prompt_tokens} + {record.workload.output_tokens} tokens."
    ]
    if record.mode != "serving":
        lines.append(
            f"Output tokens per second of {clock}: median of all rounds [lowest, highest]. Ratio "
            f"to dense: mean over {record.blocks} block(s), each with a new process of every "
            f"model, with its {100 * record.confidence:g} % interval{_without_interval(record)}. "
            "Ideal: ratio of the times that bytes moved and operations take at least."
        )
        lines += _floor(record)
    elif record.schema_version > 2:  # before, there was one pass
        lines.append(_how_served(record))
        lines += [*_halves(record), *_memory(record)]
    if record.stopped is not None:
        lines.append(f"Stopped early: {terminal_text(record.stopped)}.")
    of_points = [note for model in record.models for point in model.points for note in point.notes]
    lines += [f"{terminal_text(note)}." for note in dict.fromkeys(of_points)]  # shared in a group
    for model in record.models:
        for served in model.serving:
            name = f"{terminal_text(model.label)}, {served.described}"
            lines += [f"{name}: {terminal_text(note)}." for note in served.notes]
            if served.saturated is not None:
                lines.append(f"{name}: saturated: {terminal_text(served.saturated)}.")
    for model in record.models:
        name = terminal_text(model.label)
        lines += [f"{name}: {terminal_text(note)}." for note in model.notes]
        if model.reason:
            lines.append(f"{name} failed: {terminal_text(model.reason)}")
    return "\n".join(lines)


def _how_served(record: ThroughputRecord) -> str:
    load = record.serving_load
    what = terminal_text(load.described) if load is not None else "requests"
    return (
        f"vllm bench serve: {what}, in {record.blocks} block(s), each with a new server of every "
        f"model. Percentiles of all blocks, where there are enough requests for them. Ratios: of "
        f"means, over the blocks, with their {100 * record.confidence:g} % "
        f"interval{_without_interval(record)}."
    )


def _halves(record: ThroughputRecord) -> Iterator[str]:
    """Whether the load was steady after the warm-up."""
    served = (point.first_half for model in record.models for point in model.serving)
    halves = [half.value for half in served if half is not None]
    if halves:
        ends = " to ".join(dict.fromkeys(f"{end:.2f}" for end in (min(halves), max(halves))))
        yield (
            f"Time per token in the first half of the counted requests / second half: {ends} (1: "
            "the warm-up was long enough)."
        )


_PARTS = {
    "weights_bytes": "weights",
    "kv_cache_bytes": "KV cache",
    "activations_bytes": "activations",
}


def _memory(record: ThroughputRecord) -> Iterator[str]:
    """What each server said that its memory goes to."""
    for model in record.models:
        said = model.memory.model_dump(exclude_none=True) if model.memory is not None else {}
        parts = ", ".join(f"{_PARTS[name]} {_mebibytes(size)}" for name, size in said.items())
        if parts:
            yield f"{terminal_text(model.label)}: memory by the server's log: {parts}."


def _without_interval(record: ThroughputRecord) -> str:
    fewer = record.blocks == 1 and record.schema_version > 1
    return " (none: it takes at least 2 blocks)" if fewer else ""


def _floor(record: ThroughputRecord) -> Iterator[str]:
    """What a copy of the dense model shows: how much starts of one and the same model differ."""
    copy = record.model(record.self_check) if record.self_check is not None else None
    for point in copy.points if copy is not None else ():
        if point.ratio is not None:
            yield (
                f"Noise floor, batch {point.batch_size}: a copy of dense has "
                f"{_with_ends(point.ratio, ' ')} of its speed."
            )


def _with_ends(ratio: Ratio, between: str) -> str:
    known = ratio.low is not None and ratio.high is not None
    return f"{ratio.value:.2f}" + (f"{between}[{ratio.low:.2f}, {ratio.high:.2f}]" if known else "")


def _batch_cells(model: ModelResult, point: Point) -> list[str]:
    rate, ratio, ideal = point.output_tokens_per_second, point.ratio, point.ideal
    if rate is None:
        return [terminal_text(model.label), str(point.batch_requested), "failed", *[MISSING] * 6]
    reduced = "" if point.batch_size == point.batch_requested else f" (of {point.batch_requested})"
    return [
        terminal_text(model.label),
        f"{point.batch_size}{reduced}",
        f"{rate.median:.1f}\n[{rate.low:.1f}, {rate.high:.1f}]",
        _with_ends(ratio, "\n") if ratio is not None else MISSING,
        f"{ideal.ratio:.2f}" if ideal is not None else MISSING,
        f"{ratio.value / ideal.ratio:.2f}" if ratio is not None and ideal is not None else MISSING,
        _mebibytes(model.weights_bytes),
        _mebibytes(point.peak_memory_bytes),
        MISSING if model.kv_cache_tokens is None else f"{model.kv_cache_tokens:,}",
    ]


def _serving_cells(model: ModelResult, point: ServingPoint, with_goodput: bool) -> list[str]:
    full = "" if point.saturated is None else "\nsaturated"
    name, load = terminal_text(model.label), f"{point.described}{full}"
    if point.output_tokens_per_second is None:
        return [name, load, "failed", *[MISSING] * (4 + with_goodput)]
    latencies = (point.ttft, point.tpot, point.itl, point.e2el)
    speed = _and_ratio(f"{point.output_tokens_per_second:.1f}", point.throughput_ratio)
    goodput = [] if not with_goodput else [
        MISSING if point.goodput is None
        else _and_ratio(f"{point.goodput:.3g} requests/s", point.goodput_ratio)
    ]  # fmt: skip
    return [name, load, speed, *goodput, *map(_latency, latencies)]


def _and_ratio(figure: str, ratio: Ratio | None) -> str:
    return figure if ratio is None else f"{figure}\n{_with_ends(ratio, ' ')}"


def _latency(found: Latency | None) -> str:
    if found is None:
        return MISSING
    shown = (found.p50, found.p90, found.p99)
    values = " / ".join(MISSING if value is None else f"{value:.3g}" for value in shown)
    return _and_ratio(values, found.ratio)


def _mebibytes(size: int | None) -> str:
    return MISSING if size is None else f"{size / _MIB:,.0f} MiB"
