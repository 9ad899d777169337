"""Speed in the gate: like with like, the same machine for tokens per second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.gate.evidence import read_evidence
from streamline_bench.gate.judge import _unlike, judge
from streamline_bench.gate.result import Check, Thresholds
from streamline_bench.throughput.record import Speed
from streamline_bench.throughput.workload import ServingLoad


@pytest.fixture(scope="module")
def checks(
    make_run: Callable[..., Path],
    make_throughput: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[dict[str, Any]], dict[tuple[str, str], Check]]:
    """Return a function: throughput of the run -> its speed checks by (row, quantity)."""
    root = tmp_path_factory.mktemp("speed")
    before = read_evidence(make_run(root / "0", n=5, throughput=make_throughput()), progress=False)
    numbers = iter(range(1, 100))

    def make(throughput: dict[str, Any]) -> dict[tuple[str, str], Check]:
        run = make_run(root / str(next(numbers)), n=5, throughput=throughput)
        result = judge(read_evidence(run, progress=False), before, Thresholds(draws=100))
        return {
            (check.row, check.quantity): check
            for check in result.checks
            if check.quantity in ("tokens/s", "speed-up")
        }

    return make


def test_the_same_figures(checks: Any, make_throughput: Any) -> None:
    found = checks(make_throughput())
    assert {check.status for check in found.values()} == {"ok"}
    assert ("dense", "speed-up") not in found, "the dense model is its own measure"
    assert found["streamline", "tokens/s"].value == 130.0
    assert found["streamline", "speed-up"].value == pytest.approx(1.3)


def test_slower_beyond_noise(checks: Any, make_throughput: Any) -> None:
    found = checks(make_throughput(streamline=117.0))
    slower = found["streamline", "tokens/s"]
    assert slower.status == "regressed"
    assert slower.change == pytest.approx(-0.1)
    assert slower.low == pytest.approx(117 * 0.99 / (130 * 1.01) - 1)
    assert slower.high == pytest.approx(117 * 1.01 / (130 * 0.99) - 1)
    assert found["streamline", "speed-up"].status == "regressed"
    assert found["shortgpt", "tokens/s"].status == "ok"


def test_slower_within_what_is_tolerated(checks: Any, make_throughput: Any) -> None:
    assert checks(make_throughput(streamline=125.0))["streamline", "tokens/s"].status == "ok"


def test_slower_within_noise(checks: Any, make_throughput: Any) -> None:
    found = checks(make_throughput(streamline=117.0, spread=0.15))
    assert found["streamline", "tokens/s"].status == "cannot tell"


def test_a_slow_day_of_the_machine_keeps_the_ratio(checks: Any, make_throughput: Any) -> None:
    found = checks(make_throughput(dense=80.0, streamline=104.0, shortgpt=104.0))
    assert found["streamline", "tokens/s"].status == "regressed"
    assert found["streamline", "speed-up"].status == "ok"


def test_other_machine_compares_ratios_only(checks: Any, make_throughput: Any) -> None:
    found = checks(make_throughput(machine="machine-2", streamline=100.0))
    left_out = found["streamline", "tokens/s"]
    assert (left_out.status, left_out.reason) == ("not compared", "other machine")
    assert found["streamline", "speed-up"].status == "regressed"


def test_other_device_or_precision_compares_nothing(checks: Any, make_throughput: Any) -> None:
    for changes, reason in (
        ({"device": "another"}, "device is another here, a processor there"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16 here, float32 there"),
        ({"workload": {"prompt_tokens": 32}}, "prompt tokens is 32 here, 128 there"),
        ({"workload": {"output_tokens": 16}}, "output tokens is 16 here, 128 there"),
        ({"threads": 2}, "threads is 2 here, 1 there"),
        ({"mode": "paper"}, "mode is paper here, offline there"),
        ({"engine_version": "6"}, "engine version is 6 here, 5 there"),
    ):
        found = checks(make_throughput(**changes))
        assert ("streamline", "speed-up") not in found
        assert found["streamline", "tokens/s"].reason == reason


def test_a_failed_measurement_closes_the_gate(checks: Any, make_throughput: Any) -> None:
    found = checks(make_throughput(streamline=None))
    failed = found["streamline", "tokens/s"]
    assert (failed.status, failed.reason) == ("missing", "killed by signal 9")


def test_speed_that_is_gone_closes_the_gate(checks: Any, make_throughput: Any) -> None:
    found = checks(None)
    gone = found["streamline", "tokens/s"]
    assert (gone.status, gone.reference) == ("missing", 130.0)
    assert gone.reason == "the run has no throughput"
    without_ratio = make_throughput()
    del without_ratio["models"][1]["points"][0]["ratio"]
    found = checks(without_ratio)
    assert found["streamline", "tokens/s"].status == "ok"
    ratio = found["streamline", "speed-up"]
    assert (ratio.status, ratio.reference) == ("missing", pytest.approx(1.3))


def test_files_that_did_not_note_the_workload_are_read() -> None:
    """Leaderboards and references of earlier versions have none of it."""
    fields = {"status": "ok", "engine": "hf", "device": "a", "dtype": "float32", "batch_size": 8}
    old = Speed(**fields, clock="cpu", output_tokens_per_second=100.0)
    new = old.model_copy(update={"prompt_tokens": 32, "threads": 4, "mode": "offline"})
    assert _unlike(new, old) is None and _unlike(old, new) is None
    served = ServingLoad(request_rates=(1.0, float("inf")), requests=8).described
    assert served == "8 requests at 1, inf per second"
    loads = [old.model_copy(update={"request_load": load}) for load in (served, "another")]
    assert _unlike(*loads) == f"request load is {served} here, another there"
