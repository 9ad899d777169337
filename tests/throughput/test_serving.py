"""Servers come up, are asked at every rate, and go away; with vLLM replaced by a small stand-in."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from streamline_bench.errors import ThroughputError
from streamline_bench.throughput import ServingLoad, Setup, Workload, measure, read_record, serve
from streamline_bench.throughput.record import ThroughputRecord
from streamline_bench.throughput.serving import (
    free_port,
    is_port_conflict,
    require_free,
)

FakeModel = Callable[..., Path]
Gone = Callable[[Path], bool]

LOAD = ServingLoad(request_rates=(2.0, float("inf")), requests=4)
WORKLOAD = Workload(blocks=1, prompt_tokens=6, output_tokens=5)


@pytest.fixture(autouse=True)
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(Path(__file__).parent / "fake_vllm")
    monkeypatch.setenv("PYTHONPATH", folder)  # of the models' processes
    monkeypatch.syspath_prepend(folder)


def served(models: dict[str, Path], **changes: Any) -> ThroughputRecord:
    options = {"setup": Setup(timeout=60, start_timeout=60), "dense": "dense", **changes}
    return serve(models, workload=WORKLOAD, load=LOAD, progress=False, **options)


def test_every_rate_of_every_model(fake_model: FakeModel, gone: Gone, tmp_path: Path) -> None:
    models = {"dense": fake_model("dense"), "small": fake_model("small", 3)}
    record = served(models, output=tmp_path / "out")
    assert read_record(tmp_path / "out") == record
    assert (record.mode, record.engine, record.clock) == ("serving", "vllm", "wall")
    for model in record.models:
        assert model.status == "ok" and model.reason is None
        assert model.kv_cache_tokens == 6 * 128
        assert [point.request_rate for point in model.serving] == [2.0, float("inf")]
        point = model.serving[0]
        assert (point.completed, point.output_tokens_per_second) == (4, 10.0)
        assert point.ttft is not None and point.itl is not None
        assert (point.ttft.mean, point.ttft.p50, point.ttft.p99) == (0.25, 0.5, 0.99)
        assert (point.itl.mean, point.itl.p90) == (2.25, 2.9)
    assert all(gone(folder) for folder in models.values())


def test_a_port_taken_meanwhile_is_replaced(fake_model: FakeModel) -> None:
    folder = fake_model("dense", taken=2)
    record = served({"dense": folder})
    assert record.models[0].status == "ok"
    ports = (folder / "ports.txt").read_text().split()
    assert len(ports) == len(set(ports)) == 3


def test_another_device_than_asked_for_is_a_failed_row(
    fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM takes no device: with an accelerator there, 'cpu' would be a false word on it."""
    monkeypatch.setenv("FAKE_VLLM_PLATFORM", "cuda")
    folder = fake_model("dense")
    (model,) = served({"dense": folder}).models
    assert model.status == "failed"
    assert all(w in str(model.reason) for w in ("'cuda'", "'cpu'", "--device cuda"))
    serving = [
        p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])
    ]
    assert not serving


def test_an_engine_on_another_device_than_asked_for_is_a_failed_row(
    fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"dense": fake_model("dense")}
    reasons = {}
    for platform in ("cpu", "cuda"):
        monkeypatch.setenv("FAKE_VLLM_PLATFORM", platform)
        record = measure(models, engine="vllm", workload=WORKLOAD, progress=False)
        reasons[platform] = str(record.models[0].reason)
    assert "the engine was started" in reasons["cpu"]
    assert "'cuda'" in reasons["cuda"] and "'cpu'" in reasons["cuda"]


def test_a_port_that_is_always_taken_is_a_failed_row(fake_model: FakeModel) -> None:
    folder = fake_model("dense", taken=99)
    (model,) = served({"dense": folder}).models
    assert model.status == "failed"
    for word in ("vllm serve", "exit code 1", "starting", "Address already in use"):
        assert word in str(model.reason)
    assert {point.status for point in model.serving} == {"failed"}
    assert len((folder / "ports.txt").read_text().split()) == 3


def test_a_given_port_that_is_taken_is_refused(fake_model: FakeModel) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ThroughputError, match=rf"{port}.*in use.*--port"):
            served({"dense": fake_model("dense")}, port=port)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ({"exit": 7}, "vllm serve ended with exit code 7"),
        ({"bench_exit": 4}, "vllm bench serve ended with exit code 4"),
        ({"requests_fail": 2}, "2 of 4 requests failed"),
        ({"bench_hang": True}, "4 s while serving 2 requests per second"),
    ],
)
def test_failures_are_rows_and_leave_no_process(
    behaviour: dict[str, Any], reason: str, fake_model: FakeModel, gone: Gone
) -> None:
    models = {"bad": fake_model("bad", **behaviour), "dense": fake_model("dense")}
    setup = Setup(timeout=4, start_timeout=60)
    bad, dense = served(models, setup=setup).models
    assert reason in str(bad.reason) and bad.status == "failed"
    assert [point.status for point in bad.serving] == ["failed", "failed"]
    assert dense.status == "ok"
    assert gone(models["bad"]) and gone(models["dense"])


def test_free_ports_are_free_and_conflicts_are_recognised() -> None:
    port = free_port()
    require_free(port)
    assert 1024 <= port < 65536
    assert is_port_conflict("ERROR: [Errno 98] error while attempting to bind")
    assert is_port_conflict("OSError: address already in use")
    assert not is_port_conflict("ValueError: unsupported architecture")
