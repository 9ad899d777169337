"""Speed in the gate: like with like, the same machine for tokens per second."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from streamline_bench.errors import ComparisonError, ThroughputError
from streamline_bench.gate.evidence import Evidence, Reference, RowReference, read_evidence
from streamline_bench.gate.history import keep
from streamline_bench.gate.judge import gate, judge, judge_speed
from streamline_bench.gate.result import Check, Thresholds
from streamline_bench.gate.speed_checks import Figure, predicted, unlike, welch
from streamline_bench.gate.table import cells, verdict
from streamline_bench.report.run_file import read_run_file, write_run_file
from streamline_bench.throughput.load import ServingLoad
from streamline_bench.throughput.speed import ServedFigure, Speed


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
    assert slower.low is not None and slower.high is not None and slower.p_value is not None
    assert slower.low < -0.1 < slower.high < 0 and slower.p_value < 0.01
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
    assert unlike(new, old) is None and unlike(old, new) is None
    served = ServingLoad(request_rates=(1.0, float("inf")), requests=8).described
    assert served == "8 requests at 1, inf per second"
    loads = [old.model_copy(update={"request_load": load}) for load in (served, "another")]
    assert unlike(*loads) == f"request load is {served} here, another there"


def test_two_runs_are_compared_by_welchs_test() -> None:
    generator = np.random.default_rng(0)
    now, before = generator.normal(0, 0.02, 3), generator.normal(0.03, 0.05, 5)
    one, two = (
        Figure("tokens/s", None, math.exp(x.mean()), stats.sem(x), len(x), own=True)
        for x in (now, before)
    )
    change = welch(one, two)
    known = stats.ttest_ind(now, before, equal_var=False)
    ends = known.confidence_interval(0.95)
    assert change.p_value() == pytest.approx(known.pvalue)
    assert change.interval(0.95) == pytest.approx((ends.low, ends.high))
    alone = Figure("tokens/s", None, 1.0, None, 1, own=True)
    assert welch(alone, two).p_value() is None, "one block says nothing of the next start"


def test_many_rounds_do_not_hide_a_loss(checks: Any, make_throughput: Any) -> None:
    """Extremes move apart with every round; the error of a mean over blocks does not."""
    record = make_throughput(streamline=117.0)
    for model in record["models"]:
        for point in model["points"]:
            rate = point["output_tokens_per_second"]
            rate["low"], rate["high"] = 0.5 * rate["low"], 2 * rate["high"]
    assert checks(record)["streamline", "tokens/s"].status == "regressed"


def test_one_block_cannot_tell(checks: Any, make_throughput: Any) -> None:
    record = make_throughput(streamline=117.0)
    for model in record["models"]:
        for point in model["points"]:
            point["rounds"] = point["rounds"][:1]
            point["ratio"] |= {"low": None, "high": None, "blocks": 1}
    found = checks(record)
    assert {found["streamline", name].status for name in ("tokens/s", "speed-up")} == {
        "cannot tell"
    }
    assert found["shortgpt", "tokens/s"].status == "ok"


def kept(folder: Path, make_throughput: Any, rates: Sequence[float], **changes: Any) -> Path:
    """A history with one run a day."""
    folder.mkdir(exist_ok=True)
    for day, rate in enumerate(rates):
        record = make_throughput(
            created=f"2026-01-{day + 1:02d}T00:00:00+00:00",
            dense=rate, streamline=1.3 * rate, shortgpt=1.3 * rate, **changes,
        )  # fmt: skip
        (folder / f"{changes.get('machine', '')}{day}.json").write_text(json.dumps(record))
    return folder


def test_a_history_predicts_what_is_usual(make_throughput: Any, tmp_path: Path) -> None:
    usual = [100.0, 104.0, 97.0, 101.0, 95.0, 103.0]
    history = kept(tmp_path / "history", make_throughput, [1.0, 500.0, *usual])
    kept(history, make_throughput, [7.0] * 9, machine="another")
    run = tmp_path / "throughput.json"

    def status(**rates: float) -> dict[tuple[str, str], Check]:
        run.write_text(json.dumps(make_throughput(**rates)))
        found = gate(run, history=history, last=6)
        return {(check.row, check.quantity): check for check in found.checks}

    slow_day = status(dense=96.0, streamline=1.3 * 96, shortgpt=1.3 * 96)
    assert {check.status for check in slow_day.values()} == {"ok"}
    assert slow_day["dense", "tokens/s"].reference == pytest.approx(100, rel=0.01)
    assert slow_day["dense", "tokens/s"].how == "6 earlier runs"
    broken = status(dense=60.0, streamline=1.3 * 60, shortgpt=1.3 * 60)
    assert broken["dense", "tokens/s"].status == "regressed"
    one = status(streamline=104.0)
    assert one["streamline", "speed-up"].status == "regressed"
    assert one["shortgpt", "speed-up"].status == "ok"


def test_few_earlier_runs_predict_nothing(make_throughput: Any, tmp_path: Path) -> None:
    history = kept(tmp_path / "history", make_throughput, [100.0, 101.0])
    run = tmp_path / "throughput.json"
    run.write_text(json.dumps(make_throughput(streamline=10.0)))
    result = gate(run, history=history)
    assert {check.status for check in result.checks} == {"not compared"} and result.passed
    assert "3 needed" in str(result.checks[0].reason)
    assert "nothing was compared" in verdict(result)
    strict = gate(run, history=history, thresholds=Thresholds(strict=True))
    assert not strict.passed and strict.closing == strict.checks
    assert verdict(strict).startswith("Gate closed: nothing was compared")
    with pytest.raises(ComparisonError, match="not a folder"):
        gate(run, history=tmp_path / "none")


def test_a_run_is_not_its_own_history(
    make_throughput: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A second call of the gate found the run among the earlier ones."""
    history = kept(tmp_path / "history", make_throughput, [100.0, 101.0])
    kept(history, make_throughput, [100.0], machine="another")
    run = tmp_path / "throughput.json"
    run.write_text(json.dumps(make_throughput()))
    assert keep(run, history)[0].read_text() == run.read_text()
    caplog.set_level("WARNING", logger="streamline_bench.gate.history")
    result = gate(run, history=history)
    assert {check.status for check in result.checks} == {"not compared"}
    assert "2 earlier runs" in str(result.checks[0].reason)
    assert "1 of 4 runs" in caplog.text and "STREAMLINE_BENCH_MACHINE" in caplog.text
    (history / "gate.json").write_text("{}")
    with pytest.raises(ThroughputError, match=r"gate\.json.*remove it from the history"):
        gate(run, history=history)


def test_the_measurement_that_the_rows_name_counts(
    make_run: Callable[..., Path], make_throughput: Any, tmp_path: Path
) -> None:
    """The folder holds an older measurement too."""
    run = make_run(tmp_path / "run", n=5, throughput=make_throughput())
    newer = make_throughput(created="2026-03-01T00:00:00+00:00")
    (run / "throughput-1").mkdir()
    (run / "throughput-1/throughput.json").write_text(json.dumps(newer))
    described = read_run_file(run)
    named = {"throughput": "throughput-1/throughput.json"}
    rows = [row.model_copy(update=named) for row in described.rows]
    write_run_file(run, described.model_copy(update={"throughput": None, "rows": rows}))
    (copy,) = keep(run, tmp_path / "history")
    assert json.loads(copy.read_text()) == newer
    assert read_evidence(run, progress=False).figures.machine == "machine-1"


def test_a_wandering_machine_is_predicted_less_sharply() -> None:
    """By simulation: a quarter of the steps is scatter, the rest stays."""
    generator, alarms, naive = np.random.default_rng(3), 0, 0
    for _ in range(600):
        level = np.cumsum(generator.normal(0, 0.015, 11)) + generator.normal(0, 0.005, 11)
        change = predicted(math.exp(level[-1]), [*np.exp(level[:-1])])
        p = change.p_value()
        assert p is not None
        alarms += p < 0.05 and change.log < 0
        error = level[:-1].std(ddof=1) * math.sqrt(1.1)
        naive += 2 * stats.t.sf(abs(level[-1] - level[:-1].mean()) / error, 9) < 0.05
    assert alarms / 600 < 0.05 < naive / 600
    steady = predicted(1.0, [1.0, 1.0, 1.0])
    assert steady.p_value() == 1.0


def test_a_base_in_the_same_measurement(make_throughput: Any, tmp_path: Path) -> None:
    run = tmp_path / "throughput.json"
    run.write_text(json.dumps(make_throughput(streamline=90.0, shortgpt=None)))
    found = {check.row: check for check in gate(run, base="dense").checks}
    assert set(found) == {"streamline", "shortgpt"}
    slower = found["streamline"]
    assert (slower.status, slower.reference, slower.value) == ("regressed", 1.0, 0.9)
    assert slower.how == "3 blocks, paired"
    assert (found["shortgpt"].status, found["shortgpt"].reason) == ("missing", "killed by signal 9")
    for base, message in (
        ("streamline", "--dense streamline"),
        ("streamlin", "no row 'streamlin'"),
    ):
        with pytest.raises(ComparisonError, match=message):
            gate(run, base=base)


def served(tpot: float, goodput: float, load: float, error: float = 0.005) -> Speed:
    """A model at one load, with its ratios to a dense model of 20 ms, 4 requests/s, 30 users."""
    figures = [
        ServedFigure(load=where, metric=metric, value=value, error=error, ratio=value / dense,
                     ratio_error=error, blocks=4)
        for where, metric, value, dense in (
            ("8 in flight", "TPOT", tpot, 20.0),
            ("tpot=50ms,p=95", "goodput", goodput, 4.0),
            ("tpot=50ms,p=95", "load", load, 30.0),
        )
    ]  # fmt: skip
    fields = {"status": "ok", "engine": "vllm", "device": "a", "dtype": "float32", "batch_size": 0}
    return Speed(**fields, mode="serving", served=tuple(figures))


def test_latencies_and_goodput_of_served_models() -> None:
    def run(source: str, speed: Speed) -> Evidence:
        rows = (RowReference(label="pruned", is_dense=False, speed=speed),)
        return Evidence(Reference(source=source, title="", dense="dense", rows=rows, machine="m"))

    before = run("before", served(15.0, 5.0, 40.0))
    same = judge(run("now", served(15.1, 4.98, 40.0)), before, Thresholds())
    assert {check.status for check in same.checks} == {"ok"}
    worse = judge(run("now", served(18.0, 4.0, 30.0)), before, Thresholds())
    assert [(check.quantity, check.task, check.status) for check in worse.checks] == [
        ("TPOT ratio", "8 in flight", "regressed"),
        ("goodput ratio", "tpot=50ms,p=95", "regressed"),
        ("load ratio", "tpot=50ms,p=95", "regressed"),
    ]
    slower = worse.checks[0]
    assert slower.change == pytest.approx(0.2) and slower.low is not None and slower.low > 0.1
    better = judge(run("now", served(12.0, 6.0, 50.0)), before, Thresholds())
    assert better.passed
    gone = served(15.0, 5.0, 40.0)
    gone = gone.model_copy(update={"served": gone.served[:1]})
    missing = judge(run("now", gone), before, Thresholds()).closing
    assert [check.quantity for check in missing] == ["goodput ratio", "load ratio"]


def test_what_only_the_base_has_closes_the_gate() -> None:
    """A goodput of 0 has no ratio; such figures were left out, and the gate stayed open."""
    whole = served(15.0, 5.0, 40.0)
    alone = {"ratio": None, "ratio_error": None}
    own = tuple(figure.model_copy(update=alone) for figure in whole.served)
    tpot, goodput, load = whole.served
    lost = (tpot, goodput.model_copy(update={**alone, "value": 0.0}), load.model_copy(update=alone))
    rows = (
        RowReference(label="base", is_dense=True, speed=whole.model_copy(update={"served": own})),
        RowReference(label="head", is_dense=False, speed=whole.model_copy(update={"served": lost})),
    )
    run = Reference(source="run", title="", dense="base", rows=rows, machine="m")
    for chosen in ((), ("head",)):
        result = judge_speed(run, Thresholds(), chosen, base="base")
        assert {(check.quantity, check.status) for check in result.checks} == {
            ("TPOT ratio", "ok"), ("goodput", "missing"), ("load", "cannot tell")
        }  # fmt: skip
        assert not result.passed


def test_fields_of_a_figure_in_a_table() -> None:
    check = Check(row="a", quantity="TPOT", task="4 per second", status="ok", reference=20.0,
                  value=21.04, change=0.052)  # fmt: skip
    assert cells(check)[1:6] == ["4 per second", "TPOT", "20", "21.04", "+5.2 %"]
