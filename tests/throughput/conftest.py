"""Records made by hand for the throughput tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.throughput.figures import Rate, Ratio
from streamline_bench.throughput.record import (
    Environment,
    Ideal,
    ModelResult,
    Point,
    ThroughputRecord,
)
from streamline_bench.throughput.workload import Workload


@pytest.fixture
def point() -> Callable[..., Point]:
    """Return a function that makes a measured point, or a failed one without a median."""

    def make(batch: int, median: float | None, ratio: float | None = None, **changes: Any) -> Point:
        fields: dict[str, Any] = {"batch_requested": batch, "batch_size": batch}
        if median is None:
            fields.update(status="failed", reason="killed by signal 9")
        else:
            rate = Rate(median=median, low=median - 1, high=median + 1)
            fields.update(status="ok", output_tokens_per_second=rate, peak_memory_bytes=1000)
            fields["ideal"] = Ideal(
                kind="roofline", ratio=1.25, bytes=1.25, flops=1.3, layers=1.4, weights=1.2, ridge=8
            )
            if ratio is not None:
                fields["ratio"] = Ratio(value=ratio, low=ratio - 0.1, high=ratio + 0.1)
        return Point(**{**fields, **changes})

    return make


@pytest.fixture
def make_record() -> Callable[..., ThroughputRecord]:
    """Return a function label=points, ... -> record; ``dense`` is the reference if it is there."""

    def make(**models: list[Point]) -> ThroughputRecord:
        results = tuple(
            ModelResult(
                label=label,
                model=f"models/{label}",
                status="ok" if any(p.status == "ok" for p in points) else "failed",
                reason=None if any(p.status == "ok" for p in points) else "it was not to be",
                weights_bytes=4096,
                start_seconds=2.5,
                points=tuple(points),
            )
            for label, points in models.items()
        )
        return ThroughputRecord(
            created="2026-01-02T03:04:05+00:00",
            engine="hf",
            mode="offline",
            dense="dense" if "dense" in models else None,
            dtype="float32",
            clock="cpu",
            confidence=0.95,
            interleaved=True,
            workload=Workload(batch_sizes=(1, 8)),
            environment=Environment(
                machine_id="abc",
                device="cpu",
                device_name="a processor",
                driver=None,
                cpu_count=2,
                threads=1,
                engine_version="5",
                versions={},
                memory="rss",
                energy="not read: no accelerator",
            ),
            models=results,
        )

    return make


@pytest.fixture
def fake_model(tmp_path: Path) -> Callable[..., Path]:
    """Return a function name, layers=4, **behaviour -> a folder for :mod:`fake_engine`."""
    import json

    import numpy as np
    from safetensors.numpy import save_file

    def make(name: str, layers: int = 4, **behaviour: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tensors = {"model.embed_tokens.weight": np.zeros((50, 8), np.float32)}
        for index in range(layers):
            for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                tensors[f"model.layers.{index}.self_attn.{part}.weight"] = np.zeros((8, 8), "f4")
        save_file(tensors, folder / "model.safetensors")
        config = {"model_type": "llama", "num_hidden_layers": layers, "tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "behaviour.json").write_text(json.dumps(behaviour))
        return folder

    return make


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an engine that does as a model's folder says, for ``measure(engine=...)``."""
    folder = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", folder)  # of the models' processes
    monkeypatch.syspath_prepend(folder)
    return "fake_engine:FakeEngine"


@pytest.fixture
def gone(ended: Callable[..., bool]) -> Callable[[Path], bool]:
    """Return a function that waits until all processes noted in a model's folder are gone."""
    import json

    def wait(folder: Path, seconds: float = 20) -> bool:
        return ended(*json.loads((folder / "pids.json").read_text()), seconds=seconds)

    return wait
