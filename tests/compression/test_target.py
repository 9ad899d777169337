"""Targets: the largest size that fits, beside every size that there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.compression import compress, load_recipe
from streamline_bench.compression.pipeline import content_key
from streamline_bench.compression.target import Solver, Target, serving_memory, solved
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import RecipeError, SparsityError, ThroughputError
from streamline_bench.modeling.loading import SourceModel
from streamline_bench.throughput.latency import interpolated
from streamline_bench.throughput.record import ThroughputRecord, write_record


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("memory=24GiB,concurrency=32,context=4096", {"memory": 24 * 2**30, "concurrency": 32,
                                                      "context": 4096}),
        ("bytes=1.5GB", {"bytes": 1_500_000_000}),
        ("latency=20ms,ttft=0.5s,measured=a", {"latency": 0.02, "ttft": 0.5, "measured": "a"}),
    ],
)  # fmt: skip
def test_a_target_is_read(text: str, fields: dict[str, Any]) -> None:
    found = Target.parse(text)
    assert found.model_dump(exclude_none=True) == fields
    assert Target.model_validate(found.model_dump(exclude_none=True)) == found


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("memory=24GiB", "concurrency=N and context"),
        ("bytes=24 apples", "24 apples"),
        ("latency=20", "20ms"),
        ("concurrency=4", "no limit"),
        ("bites=1GB", "bytes"),
        ("bytes", "KEY=VALUE"),
        ("bytes=1GB,context=9", "without memory"),
    ],
)
def test_a_wrong_target_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        Target.parse(text)


def test_the_largest_checkpoint_that_fits_is_found(tiny_llama: Path, tmp_path: Path) -> None:
    """Every budget at, one below and one above the bytes of each checkpoint there is."""
    source = SourceModel.find(tiny_llama)
    real = {}
    for n in range(1, 6):
        made = compress(tiny_llama, load_recipe("last_layers", {"n_layers": n}),
                        tmp_path / str(n), progress=False)  # fmt: skip
        real[n] = CheckpointReader(made).stored_bytes
    for budget in {value + off for value in real.values() for off in (-1, 0, 1)}:
        fitting = [n for n, size in real.items() if size <= budget]
        target = Target(bytes=budget)
        if not fitting:
            with pytest.raises(SparsityError, match="at its smallest"):
                solved("last_layers", {}, target, source)
            continue
        recipe, size = solved("last_layers", {}, target, source)
        assert (recipe.n_layers, size.nbytes) == (min(fitting), real[min(fitting)])
    same = load_recipe("last_layers", {"n_layers": 2})
    recipe, _ = solved("last_layers", {}, Target(bytes=real[2]), source)
    assert content_key(source, recipe) == content_key(source, same)
    with pytest.raises(SparsityError, match="Nothing has to be removed"):
        solved("last_layers", {}, Target(bytes=source.reader.stored_bytes), source)


def test_memory_is_that_of_transformers_own_cache(tiny_llama: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = SourceModel.find(tiny_llama)
    target = Target(memory=2**30, concurrency=3, context=32)  # whole blocks of 16
    memory = serving_memory(source.reader, source.config, target)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        cache = model(torch.ones(3, 32, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(t.numel() * t.element_size() for one in cache.layers for t in (one.keys, one.values))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    whole = Solver(load_recipe("last_layers"), target, source).sizes()[0]
    per_layer = kept // 6
    assert memory.of(weights, 0) - memory.running == weights
    assert memory.of(whole.nbytes, whole.cached or 0) == (
        whole.nbytes + 5 * per_layer + memory.running
    )
    # In the pass: the stream twice, what a layer computes, the logits of each sequence twice.
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    width = min(layer // 32, 16 * 32)
    assert memory.running == 96 * (2 * 32 + width) * 4 + 3 * 100 * 8
    assert memory.tokens == 96
    one_more = serving_memory(source.reader, source.config,
                              target.model_copy(update={"context": 33}))  # fmt: skip
    assert one_more.tokens == 3 * 48


def test_a_memory_target_trades_cache_against_weights(tiny_llama: Path) -> None:
    source = SourceModel.find(tiny_llama)
    reached = {}
    for context in (16, 4096):
        asked = Target(memory=1, concurrency=8, context=context)
        solver = Solver(load_recipe("last_layers"), asked, source)
        values = {n: solver.values(size)["memory"] for n, size in enumerate(solver.sizes(), 1)}
        budget = int(values[3])
        recipe, _ = solved("last_layers", {}, asked.model_copy(update={"memory": budget}), source)
        assert recipe.n_layers == 3
        reached[context] = values[1] - values[2]
    assert reached[4096] > reached[16]  # longer sequences: a layer is worth more


def test_points_between_are_on_the_line_and_nothing_lies_beyond() -> None:
    points = [(4.0, 10.0), (8.0, 18.0), (6.0, 15.0)]
    assert [interpolated(points, x) for x in (4.0, 5.0, 7.0, 8.0)] == [10.0, 12.5, 16.5, 18.0]
    assert interpolated(points, 3.9) is interpolated(points, 8.1) is None


@pytest.fixture
def measured(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a measurement of models: (folder, seconds per token)."""

    def point(seconds: float) -> dict[str, Any]:
        return {"batch_requested": 4, "batch_size": 4, "status": "ok",
                "output_tokens_per_wall_second": 4 / seconds}  # fmt: skip

    def write(*models: tuple[Path, float]) -> Path:
        found = []
        for number, (folder, seconds) in enumerate(models):
            reader = CheckpointReader(folder)
            found.append({
                "label": f"m{number}", "model": str(folder), "status": "ok",
                "parameters": reader.num_parameters, "layers": reader.depth,
                "points": [point(seconds)],
            })  # fmt: skip
        environment = {"machine_id": "a", "device": "cpu", "device_name": "a processor",
                       "driver": None, "cpu_count": 2, "threads": 1, "engine_version": "5",
                       "versions": {}, "memory": "rss", "energy": "not read"}  # fmt: skip
        record = ThroughputRecord.model_validate({
            "created": "2026-01-02T03:04:05+00:00", "engine": "hf", "mode": "offline",
            "dense": "m0", "dtype": "float32", "clock": "wall", "confidence": 0.95,
            "interleaved": True, "workload": {"batch_sizes": [4]}, "environment": environment,
            "models": found,
        })  # fmt: skip
        return write_record(record, tmp_path)

    return write


def test_a_latency_is_interpolated_between_measured_sizes(
    measured: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    source = SourceModel.find(tiny_llama)
    half = compress(tiny_llama, load_recipe("first_layers", {"n_layers": 4}), tmp_path / "half",
                    progress=False)  # fmt: skip
    file = measured((tiny_llama, 0.030), (half, 0.014))  # 4 ms a layer

    def layers(milliseconds: float, name: str = "last_layers") -> int | None:
        target = Target.parse(f"latency={milliseconds}ms,measured={file}")
        return solved(name, {}, target, source)[0].n_layers

    assert [layers(ms) for ms in (29.9, 26, 25.9, 18, 14)] == [1, 1, 2, 3, 4]
    with pytest.raises(SparsityError, match=r"14 ms per output token.*not guessed"):
        layers(13.9)
    with pytest.raises(ThroughputError, match="llm_pruner"):
        layers(20, "llm_pruner")  # nothing of its kind was measured
    with pytest.raises(ThroughputError, match="time to the first token"):
        solved("last_layers", {}, Target.parse(f"ttft=9ms,measured={file}"), source)
    with pytest.raises(ThroughputError, match="only with 4"):
        solved(
            "last_layers", {}, Target.parse(f"latency=9ms,concurrency=8,measured={file}"), source
        )
    with pytest.raises(ThroughputError, match="names no measured"):
        solved("last_layers", {}, Target.parse("latency=9ms"), source)
