"""The tables of ``reports/throughput``, from records of batches, of servers, and of A/A runs."""

from __future__ import annotations

from typing import Any

from streamline_bench.report.text import count, markdown_text
from streamline_bench.throughput import ThroughputRecord
from streamline_bench.throughput.figures import Latency, Ratio
from streamline_bench.throughput.record import ModelResult
from streamline_bench.throughput.served import ServingPoint, Sustained

DEPTH = ("none", "layer")
TARGET = 0.95


def rows_of(record: ThroughputRecord) -> list[dict[str, Any]]:
    """One row per model and batch size; nothing of the machine's folders."""
    rows = []
    for model in record.models:
        for point in model.points:
            row: dict[str, Any] = {
                "engine": record.engine,
                "model": model.label,
                "batch_size": point.batch_size,
                "status": point.status,
                "reason": point.reason,
                "layers": model.layers,
                "parameters": model.parameters,
                "kv_bytes_per_token": model.kv_bytes_per_token,
                "kv_cache_tokens": model.kv_cache_tokens,
                "start_seconds": model.start_seconds,
                "peak_memory_bytes": point.peak_memory_bytes,
                "tokens_per_cpu_second": point.output_tokens_per_cpu_second,
                "tokens_per_wall_second": point.output_tokens_per_wall_second,
                "ideal": point.ideal.model_dump() if point.ideal else None,
                "ratio": point.ratio.model_dump() if point.ratio else None,
            }
            if point.ratio and point.ideal:
                row["of_ideal"] = point.ratio.value / point.ideal.ratio
            rows.append(row)
    return rows


def markdown(
    records: list[ThroughputRecord],
    sizes: dict[str, Any],
    self_checks: list[ThroughputRecord] | None = None,
    about: str = "A Llama with random weights",
) -> str:
    """The tables, and how they were made; ``about``: which model it is."""
    offline = [record for record in records if record.mode != "serving"]
    lines = ["# Throughput of variants with a quarter less", ""]
    if offline:
        lines += _offline(offline, sizes, about)
    for record in records:
        if record.mode == "serving":
            lines += _served(record, sizes)
    if self_checks:
        lines += _same_twice(self_checks)
    versions = ", ".join(
        dict.fromkeys(f"{r.engine}: {r.environment.engine_version}" for r in records)
    )
    return "\n".join([*lines, *([f"Engines: {versions}.", ""] if records else [])])


def _offline(records: list[ThroughputRecord], sizes: dict[str, Any], about: str) -> list[str]:
    first = records[0]
    work, where = first.workload, first.environment
    lines = [
        f"{about}: {sizes['num_hidden_layers']} layers, hidden {sizes['hidden_size']}, "
        f"vocabulary {sizes['vocab_size']}, {first.dtype}; variants by our own recipes at sparsity "
        f"0.25. {where.device_name}, {where.threads} thread, {work.prompt_tokens} + "
        f"{work.output_tokens} tokens; {', '.join(str(r.blocks) for r in records)} blocks of "
        f"{work.rounds} rounds, models taking turns round by round; load averages before and "
        "after: " + "; ".join(f"{r.engine} {_load(r)}" for r in records) + ".",
        "",
        "Tokens per processor second: median over the rounds. Ratio: mean over blocks, each with "
        "new processes, with its 95 % interval; that of `dense (again)`, a copy of dense, is what "
        "noise makes. Ideal: by bytes moved and operations, the LM head and the cache included. "
        "Written by `tests/benchmarks/throughput_vs_dense.py`.",
        "",
        "| engine | batch | model | layers | parameters | tokens / CPU s | tokens / s | ratio to "
        "dense | ideal | of ideal | KV bytes/token |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for record in records:
        for batch in record.workload.batch_sizes:
            lines += [_line(r) for r in rows_of(record) if r["batch_size"] == batch]
    return [*lines, "", verdict(records), ""]


def _served(record: ThroughputRecord, sizes: dict[str, Any]) -> list[str]:
    """A served record: latencies at every load, and the highest load that keeps the objective."""
    load, where, work = record.serving_load, record.environment, record.workload
    slo = load.slo if load is not None else None
    lines = [
        "## Served",
        "",
        f"The Llama with {sizes['num_hidden_layers']} layers and hidden {sizes['hidden_size']}, "
        f"{record.dtype}, served by {where.engine_version} on {where.device_name}, "
        f"{where.threads} thread(s), {work.prompt_tokens} + {work.output_tokens} tokens; "
        f"{load.described if load is not None else ''}; {record.blocks} blocks, each with a new "
        f"server of every model; load averages before and after: {_load(record)}. Milliseconds: "
        "means over the blocks, and the ratio to dense with its 95 % interval. Halves: time per "
        "token of the first half of the counted requests over that of the second; 1 if the "
        "warm-up was long enough.",
        "",
    ]
    served = [(model, point) for model in record.models for point in model.serving]
    if served:
        lines += [
            "| load | model | tokens / s | ratio | TTFT | ratio | TPOT | ratio | ITL | ratio | "
            "E2EL | ratio | p90 of E2EL | halves | saturated |",
            f"|---|---|{'--:|' * 12}---|",
        ]
        loads = list(dict.fromkeys(point.described for _, point in served))
        served.sort(key=lambda pair: loads.index(pair[1].described))
        lines += [_served_line(model, point) for model, point in served]
        lines.append("")
    if slo is not None:
        lines += [
            f"Highest load that keeps {slo.described}:",
            "",
            "| model | highest load | by block | ratio | goodput per second | ratio | breaks at |",
            "|---|--:|--:|--:|--:|--:|---|",
            *(_kept_line(m, m.sustained) for m in record.models if m.sustained is not None),
            "",
        ]
    lines += [f"Memory by the servers' logs: {_memory(record)}.", ""] if _memory(record) else []
    return lines


def _served_line(model: ModelResult, point: ServingPoint) -> str:
    head = f"| {point.described} | {model.label} |"
    if point.status != "ok" or point.output_tokens_per_second is None:
        return f"{head} failed: {markdown_text(point.reason or '')} |{' |' * 12}"
    cells = [f"{point.output_tokens_per_second:.1f}", _ends(point.throughput_ratio)]
    for latency in (point.ttft, point.tpot, point.itl, point.e2el):
        cells += ["", ""] if latency is None else [f"{latency.mean:.1f}", _ends(latency.ratio)]
    cells += [_p90(point.e2el), _ends(point.first_half), point.saturated or ""]
    return f"{head} {' | '.join(cells)} |"


def _kept_line(model: ModelResult, found: Sustained) -> str:
    if found.level is None:
        return f"| {model.label} | failed: {markdown_text(found.reason or '')} |{' |' * 5}"
    unit = "in flight" if found.by == "concurrency" else "requests/s"
    goodput = "" if found.goodput is None else f"{found.goodput:.3g}"
    blocks = ", ".join(f"{level:g}" for level in found.levels)
    return (
        f"| {model.label} | {found.level:.3g} {unit} | {blocks} | {_ends(found.ratio)} | {goodput} "
        f"| {_ends(found.goodput_ratio)} | {'; '.join(dict.fromkeys(found.limit))} |"
    )


def _memory(record: ThroughputRecord) -> str:
    parts = []
    for model in record.models:
        if model.memory is not None:
            known = model.memory.model_dump(exclude_none=True)
            said = [f"{name.removesuffix('_bytes')} {count(size)}B" for name, size in known.items()]
            parts.append(f"{model.label}: {', '.join(said)}".replace("kv_cache", "KV cache"))
    return "; ".join(parts)


def _ends(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    known = ratio.low is not None and ratio.high is not None
    return f"{ratio.value:.3f}" + (f" [{ratio.low:.2f}, {ratio.high:.2f}]" if known else "")


def _p90(latency: Latency | None) -> str:
    if latency is None or latency.p90 is None:
        return ""
    low, high = latency.intervals.get("p90", (None, None))
    return f"{latency.p90:.0f}" + ("" if low is None else f" [{low:.0f}, {high:.0f}]")


def copies(records: list[ThroughputRecord]) -> list[dict[str, Any]]:
    """What the copy of dense has of its speed, in each run, at each batch size."""
    found = []
    for number, record in enumerate(records, 1):
        copy = record.model(record.self_check) if record.self_check is not None else None
        for point in copy.points if copy is not None else ():
            ratio = point.ratio
            if ratio is not None and ratio.low is not None and ratio.high is not None:
                holds = ratio.low <= 1 <= ratio.high
                found.append({"run": number, "engine": record.engine, "holds": holds,
                              "batch_size": point.batch_size, **ratio.model_dump()})  # fmt: skip
    return found


def _same_twice(records: list[ThroughputRecord]) -> list[str]:
    rows = copies(records)
    holds = sum(row["holds"] for row in rows)
    reached = "met" if rows and holds >= 0.9 * len(rows) else "missed"
    return [
        "## The same model twice",
        "",
        f"{len(records)} small runs of dense and a copy of it. The 95 % interval holds 1 in "
        f"{holds} of {len(rows)} (target: 9 of 10, {reached}).",
        "",
        "| run | engine | batch | blocks | copy / dense | holds 1 |",
        "|--:|---|--:|--:|--:|---|",
        *(
            f"| {row['run']} | {row['engine']} | {row['batch_size']} | {row['blocks']} | "
            f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] | "
            f"{'yes' if row['holds'] else 'no'} |"
            for row in rows
        ),
        "",
    ]


def verdict(records: list[ThroughputRecord]) -> str:
    """One sentence per engine on the models that lost whole layers."""
    sentences = []
    for record in records:
        found = [r for r in rows_of(record) if r["model"] in DEPTH and r.get("of_ideal")]
        if found:
            shares = [r["of_ideal"] for r in found]
            reached = sum(share >= TARGET for share in shares)
            sentences.append(
                f"{record.engine}: models that lost whole layers reach {min(shares):.3f} to "
                f"{max(shares):.3f} of the ideal; {reached} of {len(shares)} figures are at least "
                f"{TARGET}."
            )
        pairs = [
            [row["ratio"] for row in found if row["batch_size"] == batch]
            for batch in record.workload.batch_sizes
        ]
        known = [pair for pair in pairs if len(pair) == len(DEPTH) and _have_intervals(pair)]
        if known:
            meet = sum(a["low"] <= b["high"] and b["low"] <= a["high"] for a, b in known)
            sentences.append(
                f"Of {' and '.join(DEPTH)}, which have the same shapes, the intervals meet in "
                f"{meet} of {len(known)}."
            )
    return " ".join(sentences)


def _have_intervals(pair: list[dict[str, Any]]) -> bool:
    return all(ratio["low"] is not None and ratio["high"] is not None for ratio in pair)


def _load(record: ThroughputRecord) -> str:
    return ", ".join("?" if v is None else f"{v:.1f}" for v in record.environment.load_average)


def _line(row: dict[str, Any]) -> str:
    head = f"| {row['engine']} | {row['batch_size']} | {row['model']} |"
    if row["status"] != "ok":
        return f"{head} | | failed: {markdown_text(row['reason'])} | | | | | |"
    ratio, ideal = row["ratio"], row["ideal"]
    known = row["model"] != "dense" and ratio["low"] is not None
    ends = f" [{ratio['low']:.2f}, {ratio['high']:.2f}]" if known else ""
    return (
        f"{head} {row['layers']} | {row['parameters'] / 1e6:.1f} M | "
        f"{row['tokens_per_cpu_second']:.1f} | {row['tokens_per_wall_second']:.1f} | "
        f"{ratio['value']:.3f}{ends} | {ideal['ratio']:.3f} | "
        f"{row['of_ideal']:.3f} | {row['kv_bytes_per_token']} |"
    )


def summary(
    records: list[ThroughputRecord],
    sizes: dict[str, Any],
    self_checks: list[ThroughputRecord] | None = None,
) -> dict[str, Any]:
    """The committed form: every figure, no folder of this machine."""
    return {
        "sizes": sizes,
        "target": {"models": DEPTH, "of_ideal": TARGET},
        "runs": [
            {
                "engine": record.engine,
                "mode": record.mode,
                "created": record.created,
                "clock": record.clock,
                "dtype": record.dtype,
                "workload": record.workload.model_dump(mode="json"),
                "environment": record.environment.model_dump(mode="json"),
                **(
                    {
                        "serving_load": record.serving_load
                        and record.serving_load.model_dump(mode="json"),
                        "models": _served_models(record),
                    }
                    if record.mode == "serving"
                    else {"rows": rows_of(record)}
                ),
            }
            for record in records
        ],
        "self_checks": copies(self_checks or []),
    }


def _served_models(record: ThroughputRecord) -> list[dict[str, Any]]:
    kept = {"label", "status", "reason", "layers", "parameters", "kv_cache_tokens", "serving",
            "sustained", "memory"}  # fmt: skip
    return [model.model_dump(mode="json", include=kept) for model in record.models]
