"""Servers come up, are asked at every rate, and go away; with vLLM replaced by a small stand-in."""

from __future__ import annotations

import importlib.util
import itertools
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from streamline_bench.cli.tables import throughput_notes
from streamline_bench.core.machine.processes import free_port
from streamline_bench.errors import ThroughputError
from streamline_bench.report.figures.pareto import points_of
from streamline_bench.report.figures.serving import kept_objectives, serving_curves
from streamline_bench.report.leaderboard import read_leaderboard
from streamline_bench.throughput import (
    ServingLoad,
    Setup,
    Slo,
    Workload,
    figures_of,
    measure,
    read_record,
    serve,
    sweep,
)
from streamline_bench.throughput.bench import Sending, bench_command
from streamline_bench.throughput.engines import EngineSettings
from streamline_bench.throughput.process import WorkerError
from streamline_bench.throughput.record import ThroughputRecord
from streamline_bench.throughput.server import (
    is_port_conflict,
    require_free,
    server_command,
)

FakeModel = Callable[..., Path]
Gone = Callable[[Path], bool]

LOAD = ServingLoad(request_rates=(2.0, float("inf")), requests=8)
WORKLOAD = Workload(blocks=1, prompt_tokens=6, output_tokens=5)


@pytest.fixture(autouse=True)
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(Path(__file__).parent / "fake_vllm")
    monkeypatch.setenv("PYTHONPATH", folder)  # of the models' processes
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server and no client is started: what they would answer is computed here."""
    path = Path(__file__).parent / "fake_vllm/vllm/entrypoints/cli/main.py"
    spec = importlib.util.spec_from_file_location("fake_main", path)
    assert spec is not None and spec.loader is not None
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)

    class InProcess:
        def __init__(self, job: str, environment: object, log: Path, python: object) -> None:
            assert job == "streamline_bench.throughput.server:ServingJob"
            self.log = log
            log.touch()

        def ask(self, call: str, doing: str, timeout: float, **given: Any) -> Any:
            if call == "load":
                self.settings = EngineSettings(**given["settings"])
                command = server_command(self.settings, given["port"])[2:]
                monkeypatch.setattr(sys, "argv", command)
                folder = Path(self.settings.model)
                main.note_start(folder)
                if json.loads((folder / "behaviour.json").read_text()).get("taken"):
                    with self.log.open("a") as log:
                        log.write("OSError: [Errno 98] Address already in use\n")
                    raise WorkerError("OSError: Address already in use")
                return {"vocab_size": 0, "kv_cache_tokens": 768}
            asked = Sending(**given["asked"])
            command = bench_command(self.settings, 1, asked, Path("/none/result.json"))[2:]
            monkeypatch.setattr(sys, "argv", command)
            return main.answer(Path(self.settings.model))

        def hang_up(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(sweep, "ModelProcess", InProcess)


def served(models: dict[str, Path], **changes: Any) -> ThroughputRecord:
    options: dict[str, Any] = {"workload": WORKLOAD, "load": LOAD, "dense": "dense"}
    options |= {"setup": Setup(timeout=60, start_timeout=60), **changes}
    return serve(models, progress=False, **options)


def sent(folder: Path) -> list[dict[str, str]]:
    """Options of every run of the client, in order."""
    lines = [json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines()]
    return [dict(itertools.pairwise(line)) for line in lines]


def test_every_load_of_a_server(fake_model: FakeModel, gone: Gone, tmp_path: Path) -> None:
    folder = fake_model("dense")
    record = served({"dense": folder}, output=tmp_path / "out")
    assert read_record(tmp_path / "out") == record
    assert (record.mode, record.engine, record.clock) == ("serving", "vllm", "wall")
    (model,) = record.models
    assert model.status == "ok" and model.reason is None and model.kv_cache_tokens == 6 * 128
    assert model.memory is not None and model.memory.weights_bytes == 5 << 29
    assert model.memory.kv_cache_bytes == 3 << 28 and model.memory.activations_bytes is None
    assert [point.request_rate for point in model.serving] == [2.0, float("inf")]
    assert [point.completed for point in model.serving] == [8, 8]
    notes = throughput_notes(record)
    assert "dense: memory by the server's log: weights 2,560 MiB, KV cache 768 MiB." in notes
    assert "first half of the counted requests / second half: " in notes
    assert gone(folder)


@pytest.mark.usefixtures("in_process")
def test_blocks_start_every_server_anew_and_pair_what_is_sent(
    fake_model: FakeModel, tmp_path: Path
) -> None:
    """The dense server is fast at its first start, then slow; the other always takes 3/4."""
    speeds = {"starts": [1.0, 0.8], "knee": 1e9}
    models = {"dense": fake_model("dense", **speeds), "small": fake_model("small", 3, **speeds)}
    load = ServingLoad(request_rates=(2.0,), concurrencies=(2,), requests=16, arrivals="constant")
    workload = WORKLOAD.model_copy(update={"blocks": 2})
    output = tmp_path / "out"
    record = served(models, workload=workload, load=load, output=output)
    assert read_record(output) == record
    assert (record.mode, record.blocks, record.stopped) == ("serving", 2, None)
    assert sorted((tmp_path / "starts.txt").read_text().split()) == ["dense"] * 2 + ["small"] * 2
    for model in record.models:
        assert model.status == "ok" and model.kv_cache_tokens == 768
        assert [point.concurrency for point in model.serving] == [None, 2]
        assert [each.block for each in model.serving[0].passes] == [0, 1]
    small = record.models[1].serving[1]
    assert small.completed == 32 and small.throughput_ratio is not None and small.tpot is not None
    for ratio, value in ((small.tpot.ratio, 0.75), (small.throughput_ratio, 4 / 3)):
        assert ratio is not None and ratio.low is not None and ratio.high is not None
        assert ratio.value == pytest.approx(value, rel=0.02)
        assert ratio.high - ratio.low < 0.02, "both models started slow in the same block"
    assert small.tpot.p50 is not None and small.tpot.p99 is None, "of 32 requests"
    assert small.first_half is not None and small.first_half.value == pytest.approx(1, abs=0.02)
    one, other = sent(models["dense"]), sent(models["small"])
    same = ("--seed", "--request-rate", "--burstiness", "--num-prompts")
    assert [[each[name] for name in same] for each in one] == [
        [each[name] for name in same] for each in other
    ]
    assert len({each["--seed"] for each in one}) == 4, "no prompt is sent twice"
    assert [each["--num-prompts"] for each in one[:2]] == ["24", "24"], "8 of warm-up"


@pytest.mark.usefixtures("in_process")
def test_more_requests_than_are_served_are_named(fake_model: FakeModel) -> None:
    """A token takes 0.01125 s, a request of 5 tokens 0.056 s: 17 a second are served."""
    models = {"dense": fake_model("dense", slow_start=10)}
    load = ServingLoad(request_rates=(4.0, 40.0), concurrencies=(32, 256), requests=40)
    (model,) = served(models, load=load).models
    slow, fast, few, many = model.serving
    assert slow.saturated is None and "piled up" in str(fast.saturated)
    assert few.saturated is None and "from 32 to 256 in flight" in str(many.saturated)
    assert fast.first_half is not None and fast.first_half.value < 0.8
    assert any("latencies grew" in note for note in fast.notes)


@pytest.mark.usefixtures("in_process")
def test_a_warm_up_that_is_too_short_is_named(fake_model: FakeModel) -> None:
    models = {"dense": fake_model("dense", slow_start=12)}
    for warm, named in ((0, True), (12, False)):
        load = ServingLoad(request_rates=(2.0,), requests=16, warmup_requests=warm)
        (model,) = served(models, load=load).models
        assert any("--warmup-requests" in note for note in model.serving[0].notes) is named


@pytest.mark.usefixtures("in_process")
def test_how_many_more_users_keep_the_objective(fake_model: FakeModel) -> None:
    """Tokens take 10 ms x (1 + users / 8), or 3/4 of it: 50 ms holds up to 32 or 45 users."""
    models = {"dense": fake_model("dense"), "small": fake_model("small", 3)}
    slo = Slo.parse("tpot=50ms,ttft=1s")
    load = ServingLoad(request_rates=(), slo=slo, requests=8)
    workload = WORKLOAD.model_copy(update={"blocks": 2, "output_tokens": 40})
    record = served(models, workload=workload, load=load)
    dense, small = (model.sustained for model in record.models)
    assert dense is not None and small is not None and record.models[0].status == "ok"
    assert dense.level == pytest.approx(32, abs=2) and small.level == pytest.approx(45, abs=3)
    assert set(dense.limit) == {"tpot"}
    assert small.ratio is not None and small.ratio.value == pytest.approx(45 / 32, rel=0.08)
    assert small.ratio.blocks == 2 and small.ratio.low is not None
    assert small.goodput_ratio is not None and small.goodput_ratio.value > 1.1
    first = [probe.level for probe in dense.probes if probe.block == 0]
    again = [probe.level for probe in dense.probes if probe.block == 1]
    assert first[:2] == [1, 2] and again[0] == dense.levels[0] and len(again) < len(first)
    goodput = sent(models["dense"])[0]
    assert goodput["--goodput"] == "ttft:1000" and goodput["ttft:1000"] == "tpot:50"


@pytest.mark.usefixtures("in_process")
def test_a_report_draws_what_a_record_holds(fake_model: FakeModel, repository: Path) -> None:
    board = read_leaderboard(repository / "reports/demo/leaderboard.json")
    labels = [board.dense_row.label, next(row.label for row in board.rows if not row.is_dense)]
    models = dict(zip(labels, (fake_model("big"), fake_model("small", 3)), strict=True))
    load = ServingLoad(concurrencies=(1, 8, 32), slo=Slo.parse("tpot=50ms"), requests=8)
    found = figures_of(served(models, load=load, dense=labels[0]))
    rows = [
        row.model_copy(update={"throughput": found[row.label]})
        for row in board.rows
        if row.label in found
    ]
    assert {(curve.up[:4], curve.across[:8]) for curve in serving_curves(rows)} == {
        ("toke", "tokens p"), ("time", "requests")
    }  # fmt: skip
    kept = {each.row.label: each for each in kept_objectives(rows)}
    assert kept[labels[1]].load.value > kept[labels[0]].load.value > 1
    goodput = {point.label: point.x for point in points_of(rows, "goodput")}
    assert goodput[labels[1]] > goodput[labels[0]] > 0


@pytest.mark.usefixtures("in_process")
def test_an_objective_that_nothing_keeps_and_one_that_all_keep(fake_model: FakeModel) -> None:
    models = {"dense": fake_model("dense")}
    for text, level, limit in (
        ("tpot=1ms", 0, "tpot"),
        ("e2el=100s", 8, "the most that is tried"),
    ):
        load = ServingLoad(request_rates=(), slo=Slo.parse(text), requests=8, max_concurrency=8)
        (model,) = served(models, load=load).models
        assert model.sustained is not None and model.status == "ok"
        assert (model.sustained.levels, model.sustained.limit) == ((level,), (limit,))
        assert model.sustained.level == pytest.approx(level)


@pytest.mark.usefixtures("in_process")
def test_prompts_of_a_file_and_a_shared_prefix(fake_model: FakeModel, tmp_path: Path) -> None:
    models = {"dense": fake_model("dense")}
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Once upon a time", "output_tokens": 30}\n')
    load = ServingLoad(request_rates=(2.0,), prompts=str(file), output_lengths="data", requests=8)
    assert served(models, load=load).models[0].status == "ok"
    (asked,) = sent(models["dense"])
    assert (asked["--dataset-name"], asked["--custom-output-len"]) == ("custom", "-1")
    server = json.loads((models["dense"] / "serve.json").read_text())
    assert int(server[server.index("--max-model-len") + 1]) == 16 + 30 + 16
    shared = ServingLoad(request_rates=(2.0,), prefix_tokens=4, requests=8)
    served(models, load=shared)
    asked = sent(models["dense"])[-1]
    assert (asked["--random-prefix-len"], asked["--random-input-len"]) == ("4", "2")
    with pytest.raises(ThroughputError, match="leaves nothing of the 6 tokens"):
        served(models, load=shared.model_copy(update={"prefix_tokens": 6}))


def test_a_port_taken_meanwhile_is_replaced(fake_model: FakeModel, gone: Gone) -> None:
    folder = fake_model("dense", taken=1)
    record = served({"dense": folder}, load=ServingLoad(request_rates=(2.0,), requests=8))
    assert record.models[0].status == "ok"
    ports = (folder / "ports.txt").read_text().split()
    assert len(ports) == len(set(ports)) == 2
    assert gone(folder)


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


@pytest.mark.usefixtures("in_process")
def test_a_port_that_is_always_taken_is_a_failed_row(fake_model: FakeModel) -> None:
    folder = fake_model("dense", taken=99)
    (model,) = served({"dense": folder}).models
    assert model.status == "failed" and "Address already in use" in str(model.reason)
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
        ({"exit": 7}, "vllm serve ended with exit code 7 (while starting the server)"),
        ({"never_ready": True}, "no answer within 3 s while starting the server"),
        ({"out_of_memory": True}, "out of memory"),
        ({"bench_exit": 4}, "vllm bench serve ended with exit code 4"),
        ({"requests_fail": 2}, "2 of 16 requests failed: ClientConnectorError"),
        ({"bench_hang": True}, "2 s while serving 2 requests per second"),
        ({"kills_server_at": 1}, "vllm serve ended with exit code -9"),
    ],
)
def test_failures_are_rows_and_leave_no_process(
    behaviour: dict[str, Any], reason: str, fake_model: FakeModel, gone: Gone
) -> None:
    models = {"bad": fake_model("bad", **behaviour)}
    start = 3 if "never_ready" in behaviour else 60
    setup = Setup(timeout=2 if "bench_hang" in behaviour else 60, start_timeout=start)
    (bad,) = served(models, setup=setup, dense="bad", load=LOAD).models
    assert reason in str(bad.reason) and bad.status == "failed"
    assert [point.status for point in bad.serving] == ["failed", "failed"]
    if "out_of_memory" in behaviour:
        assert "--max-concurrency" in str(bad.reason) and "8 sequences of 27" in str(bad.reason)
    assert gone(models["bad"])


def test_a_server_that_dies_later(fake_model: FakeModel, gone: Gone) -> None:
    """It dies in its second block, between two loads; what it gave before is no figure."""
    models = {"bad": fake_model("bad", kills_server_at=4)}
    workload = WORKLOAD.model_copy(update={"blocks": 2})
    record = served(models, workload=workload, dense="bad")
    (bad,) = record.models
    assert "vllm serve ended" in str(bad.reason)
    assert [point.status for point in bad.serving] == ["ok", "failed"]
    assert [len(point.passes) for point in bad.serving] == [2, 1]
    assert gone(models["bad"])


@pytest.mark.usefixtures("in_process")
def test_a_model_that_fails_leaves_the_others(fake_model: FakeModel) -> None:
    models = {"bad": fake_model("bad", itls="none"), "dense": fake_model("dense")}
    bad, dense = served(models).models
    assert (bad.status, dense.status) == ("failed", "ok") and "itls" in str(bad.reason)


def test_a_clock_that_jumps_is_a_failed_row(
    fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch, gone: Gone
) -> None:
    """The client sends by the system's clock: after a jump, its load was another."""
    monkeypatch.setenv("FAKE_CLOCK_JUMP", "5")
    folder = fake_model("dense")
    (model,) = served({"dense": folder}).models
    assert model.status == "failed" and "clock was set by +5.0 s" in str(model.reason)
    assert gone(folder)


def test_free_ports_are_free_and_conflicts_are_recognised() -> None:
    port = free_port()
    require_free(port)
    assert 1024 <= port < 65536
    assert is_port_conflict("ERROR: [Errno 98] error while attempting to bind")
    assert is_port_conflict("OSError: address already in use")
    assert not is_port_conflict("ValueError: unsupported architecture")
