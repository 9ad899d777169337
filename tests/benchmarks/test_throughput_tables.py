"""The tables of ``reports/throughput``: batches, servers, and runs of one model twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from throughput_tables import copies, markdown, summary, verdict

from streamline_bench.throughput import ServingLoad, Slo, ThroughputRecord, Workload
from streamline_bench.throughput.figures import Latency, Rate, Ratio
from streamline_bench.throughput.record import Environment, Ideal, ModelResult, Point
from streamline_bench.throughput.served import MemorySplit, ServingPoint, Sustained

SIZES = {"num_hidden_layers": 24, "hidden_size": 512, "vocab_size": 2048}


def record(mode: str, *models: ModelResult, **changes: Any) -> ThroughputRecord:
    where = Environment(
        machine_id="m", device="cpu", device_name="a processor", driver=None, cpu_count=2,
        threads=1, engine_version="5", versions={}, memory="rss", energy="none",
    )  # fmt: skip
    fields = {"created": "2026-01-02T03:04:05+00:00", "engine": "vllm", "mode": mode,
              "dense": "dense", "dtype": "float32", "clock": "wall", "confidence": 0.95,
              "interleaved": True, "blocks": 3, "workload": Workload(batch_sizes=(1,)),
              "environment": where, "models": models}  # fmt: skip
    return ThroughputRecord(**{**fields, **changes})


def batch(label: str, value: float, low: float, high: float) -> ModelResult:
    point = Point(
        batch_requested=1, batch_size=1, status="ok",
        output_tokens_per_second=Rate(median=9, low=8, high=10), output_tokens_per_cpu_second=9,
        output_tokens_per_wall_second=7, ratio=Ratio(value=value, low=low, high=high, blocks=3),
        ideal=Ideal(kind="roofline", ratio=1.25, flops=1.2, layers=1.3, weights=1.2),
    )  # fmt: skip
    return ModelResult(
        label=label, model="/secret/folder", status="ok", parameters=10**6, points=(point,)
    )


def served(label: str, ratio: float | None) -> ModelResult:
    to_dense = None if ratio is None else Ratio(value=ratio, low=ratio - 0.1, high=ratio + 0.1)
    latency = Latency(mean=40, p90=51, intervals={"p90": (48, 63)}, ratio=to_dense)
    flat = Ratio(value=1.01, low=0.97, high=1.05)
    found = {"ttft": latency, "tpot": latency, "itl": latency, "e2el": latency}
    points = [
        ServingPoint(request_rate=float("inf"), concurrency=users, status="ok", completed=72,
                     output_tokens_per_second=users * 10, throughput_ratio=to_dense,
                     first_half=flat, saturated="full" if users == 4 else None, **found)
        for users in (1, 4)
    ]  # fmt: skip
    kept = Sustained(by="concurrency", status="ok", level=6, levels=(6, 6, 6), goodput=2.5,
                     ratio=to_dense, goodput_ratio=to_dense, limit=("tpot", "tpot"))  # fmt: skip
    memory = MemorySplit(weights_bytes=3 * 10**8, kv_cache_bytes=5 * 10**7)
    return ModelResult(label=label, model="/secret/folder", status="ok", serving=tuple(points),
                       sustained=kept, memory=memory)  # fmt: skip


def test_batches_and_servers_have_tables_of_their_own() -> None:
    load = ServingLoad(concurrencies=(1, 4), slo=Slo(tpot=0.09))
    failed = ModelResult(
        label="gone", model="x", status="failed",
        serving=(ServingPoint(request_rate=float("inf"), concurrency=1, status="failed",
                              reason="out | of memory"),),
    )  # fmt: skip
    records = [
        record("offline", batch("dense", 1, 1, 1), batch("none", 1.3, 1.2, 1.4)),
        record("serving", served("dense", None), served("none", 0.75), failed, serving_load=load),
    ]
    text = markdown(records, SIZES)
    assert "| vllm | 1 | none |" in text and "1.300 [1.20, 1.40] | 1.250 | 1.040" in text
    row = next(line for line in text.splitlines() if line.startswith("| 4 in flight | none |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:6] == ["40.0", "0.750 [0.65, 0.85]", "40.0", "0.750 [0.65, 0.85]"]
    assert cells[12:] == ["51 [48, 63]", "1.010 [0.97, 1.05]", "full"]
    assert "| none | 6 in flight | 6, 6, 6 | 0.750 [0.65, 0.85] | 2.5 |" in text
    assert "tpot=90ms,p=95" in text and "weights 300 MB, KV cache 50 MB" in text
    tables: list[list[str]] = [[]]
    for line in text.splitlines():
        tables[-1].append(line) if line.startswith("|") else tables.append([])
    for table in filter(None, tables):
        assert len({line.replace(r"\|", "").count("|") for line in table}) == 1
    kept = json.dumps(summary(records, SIZES))
    assert "secret" not in kept and '"mode": "serving"' in kept


def test_how_often_the_copy_of_dense_is_told_from_it() -> None:
    runs = [
        record("offline", batch("dense", 1, 1, 1), batch("copy", value, value - 0.02, value + 0.02),
               self_check="copy")
        for value in [1.01] * 8 + [1.05, 0.99]
    ]  # fmt: skip
    assert [row["holds"] for row in copies(runs)] == [True] * 8 + [False, True]
    text = markdown([], SIZES, runs)
    assert "holds 1 in 9 of 10 (target: 9 of 10, met)" in text
    assert "7 of 8 (target: 9 of 10, missed)" in markdown([], SIZES, [*runs[:7], runs[8]])
    assert copies([record("offline", batch("dense", 1, 1, 1))]) == []


def test_models_of_the_same_shape_are_held_against_each_other() -> None:
    apart = record("offline", batch("none", 1.2, 1.1, 1.25), batch("layer", 1.4, 1.3, 1.5))
    touching = record("offline", batch("none", 1.2, 1.1, 1.3), batch("layer", 1.4, 1.3, 1.5))
    assert "meet in 0 of 1" in verdict([apart])
    assert "meet in 1 of 1" in verdict([touching])
