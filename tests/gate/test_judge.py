"""The gate on run folders: what closes it, and what must not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from streamline_bench.errors import ComparisonError, SamplesError
from streamline_bench.gate.evidence import read_evidence
from streamline_bench.gate.judge import gate, judge
from streamline_bench.gate.result import Check, GateResult, Thresholds
from streamline_bench.stability.statistics.clusters import cluster_labels
from streamline_bench.stability.statistics.paired import Outcomes, PairedSample
from streamline_bench.stability.statistics.score import PairedDifference

FAST = Thresholds(draws=500)


def check(result: GateResult, row: str, quantity: str, task: str | None) -> Check:
    (found,) = [c for c in result.checks if (c.row, c.quantity, c.task) == (row, quantity, task)]
    return found


def test_a_run_against_itself(reference_run: Path) -> None:
    result = gate(reference_run, reference_run, thresholds=FAST, progress=False)
    assert result.passed and not result.new
    assert {c.status for c in result.checks} == {"ok"}
    assert {c.row for c in result.checks} == {"dense", "streamline", "shortgpt"}
    assert {c.quantity for c in result.checks if c.row == "dense"} == {"accuracy"}
    assert {c.quantity for c in result.checks if c.row == "shortgpt"} == {"accuracy", "stability"}
    strict = FAST.model_copy(update={"strict": True})
    again = gate(reference_run, reference_run, thresholds=strict, progress=False)
    assert again.passed, "no answer changed, however few there are"


@pytest.fixture(scope="module")
def spoiled(make_run: Any, spoil: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty answers of one row on one task lost."""
    folder = tmp_path_factory.mktemp("spoiled")
    run: Path = make_run(folder, changes={("streamline", "arc"): spoil(40)})
    return run


def test_lost_answers_close_it(reference_run: Path, spoiled: Path) -> None:
    result = gate(spoiled, reference_run, thresholds=FAST, progress=False)
    assert not result.passed
    lost = check(result, "streamline", "accuracy", "arc")
    assert lost.status == "regressed" and lost.how == "paired, 300 questions"
    assert lost.change == pytest.approx(-40 / 300) and lost.high is not None and lost.high < 0
    assert check(result, "streamline", "accuracy", None).status == "regressed"
    assert check(result, "streamline", "accuracy", "piqa").status == "ok"
    assert {c.row for c in result.closing} == {"streamline"}


def test_holm_counts_the_tasks_of_a_row(reference_run: Path, spoiled: Path) -> None:
    result = gate(spoiled, reference_run, thresholds=FAST, progress=False)
    # 40 discordant pairs, all one way: McNemar's score is sqrt(40); p is doubled for two tasks.
    lost = check(result, "streamline", "accuracy", "arc")
    assert lost.p_value == pytest.approx(2 * math.erfc(math.sqrt(40 / 2)))
    mean = check(result, "streamline", "accuracy", None)
    assert lost.low is not None and lost.high is not None and lost.high < 0
    # The interval counts both tasks too: -40 / 300 at a level of 2.5 %.
    alone = PairedDifference((PairedSample(Outcomes(0, 40, 0, 260)),)).interval(0.975)
    assert (lost.low, lost.high) == pytest.approx((alone.low, alone.high))
    assert mean.p_value is None and mean.high is not None and mean.high < 0
    same = check(result, "streamline", "accuracy", "piqa")
    assert same.p_value == 1.0 and same.how == "no answer changed" and same.low is None


def test_a_gain_keeps_it_open(reference_run: Path, spoiled: Path) -> None:
    result = gate(reference_run, spoiled, thresholds=FAST, progress=False)
    gained = check(result, "streamline", "accuracy", "arc")
    assert gained.status == "ok" and gained.change == pytest.approx(40 / 300)


def test_a_small_loss_is_not_told_from_noise(
    reference_run: Path, make_run: Callable[..., Path], spoil: Any, tmp_path: Path
) -> None:
    run = make_run(tmp_path, changes={("streamline", "arc"): spoil(4)})
    result = gate(run, reference_run, thresholds=FAST, progress=False)
    assert check(result, "streamline", "accuracy", "arc").status == "cannot tell"
    assert result.passed
    strict = FAST.model_copy(update={"strict": True})
    assert not gate(run, reference_run, thresholds=strict, progress=False).passed
    wide = FAST.model_copy(update={"accuracy": 0.05, "stability": 0.06, "strict": True})
    assert gate(run, reference_run, thresholds=wide, progress=False).passed


def test_stability_alone_can_close_it(
    reference_run: Path, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    """As many right as before, but others: accuracy is kept, agreement is not."""
    folder = reference_run / "dense" / "eval" / "arc.json"
    dense = {k: v["prediction"] == v["gold"] for k, v in json.loads(folder.read_text()).items()}

    moved: list[int] = []

    def swap(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Lose answers that dense has right, gain as many that it has wrong."""
        right = [e["prediction"] == e["gold"] for e in entries]
        lost = [i for i, now in enumerate(right) if now and dense[str(i)]]
        won = [i for i, now in enumerate(right) if not now and not dense[str(i)]]
        assert len(won) > 10
        moved.append(len(won))
        for one, other in zip(lost[: len(won)], won, strict=True):
            entries[one]["prediction"] = next(x for x in "ABCD" if x != entries[one]["gold"])
            entries[other]["prediction"] = entries[other]["gold"]
        return entries

    run = make_run(tmp_path, changes={("streamline", "arc"): swap})
    result = gate(run, reference_run, thresholds=FAST, progress=False)
    accuracy = check(result, "streamline", "accuracy", "arc")
    assert accuracy.change == 0.0 and accuracy.status != "regressed"
    stability = check(result, "streamline", "stability", "arc")
    assert stability.status == "regressed" and stability.how == "paired, 300 questions"
    before, now = stability.reference, stability.value
    assert before is not None and now is not None and stability.change is not None
    assert stability.change == pytest.approx(now - before, abs=1e-9)
    assert stability.change == pytest.approx(-2 * moved[0] / 300, abs=0.02)


def test_estimates_where_there_are_no_answers(
    reference_run: Path, spoiled: Path, tmp_path: Path
) -> None:
    """A leaderboard moved alone has no answers: standard errors and intervals must do."""
    alone = tmp_path / "leaderboard.json"
    shutil.copy(reference_run / "leaderboard.json", alone)
    result = gate(spoiled, alone, thresholds=FAST, progress=False)
    lost = check(result, "streamline", "accuracy", "arc")
    before, now = lost.reference, lost.value
    assert lost.how == "standard errors" and before is not None and now is not None
    error = sum(p * (1 - p) / 299 for p in (before, now)) ** 0.5
    # At a level of 2.5 %: two tasks.
    assert lost.low == pytest.approx(now - before - 2.241403 * error, abs=1e-6)
    assert lost.status == "regressed"
    assert check(result, "streamline", "stability", "arc").how == "intervals"
    paired = gate(spoiled, reference_run, thresholds=FAST, progress=False)
    narrow = check(paired, "streamline", "accuracy", "arc")
    assert narrow.low is not None and lost.low is not None
    assert narrow.low > lost.low, "pairing is what makes it sharp"


def test_failed_and_missing_rows_and_tasks_close_it(
    reference_run: Path, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path, tasks=("arc",), failed={"shortgpt": "out of memory"})
    result = gate(run, reference_run, thresholds=FAST, progress=False)
    failed = check(result, "shortgpt", "result", None)
    assert (failed.status, failed.reason) == ("missing", "out of memory")
    assert check(result, "streamline", "accuracy", "piqa").status == "missing"
    assert not result.passed
    again = gate(reference_run, run, thresholds=FAST, progress=False)
    assert again.passed and again.new == ("shortgpt", "piqa (dense, streamline)")
    assert not [c for c in again.checks if c.row == "shortgpt"], "nothing to compare with"


def test_a_stability_that_is_gone_closes_it(reference_run: Path, tmp_path: Path) -> None:
    payload = json.loads((reference_run / "leaderboard.json").read_text())
    (row,) = [row for row in payload["rows"] if row["label"] == "streamline"]
    (task,) = [task for task in row["tasks"] if task["task"] == "arc"]
    before = task["comparison"]["stability"]["value"]
    task["comparison"]["stability"] = None
    (tmp_path / "leaderboard.json").write_text(json.dumps(payload))
    result = gate(tmp_path, reference_run, thresholds=FAST, progress=False)
    gone = check(result, "streamline", "stability", "arc")
    assert (gone.status, gone.reference, gone.value) == ("missing", before, None)
    assert result.closing == (gone,)
    assert check(result, "streamline", "stability", "piqa").value is not None
    back = gate(reference_run, tmp_path, thresholds=FAST, progress=False)
    assert back.passed, "what the reference has not, cannot be lost"


def test_a_row_without_a_result_to_compare_with_is_refused(
    reference_run: Path, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    failed = {"shortgpt": "out of memory"}
    run = make_run(tmp_path / "run", failed=failed)
    for rows in (["shortgpt"], ["dense", "shortgpt"]):
        with pytest.raises(ComparisonError, match=r"'shortgpt' failed in .* \(out of memory\)"):
            gate(reference_run, run, thresholds=FAST, rows=rows, progress=False)
    against = read_evidence(run, progress=False)
    nothing = [row.model_copy(update={"failed": "gone"}) for row in against.figures.rows]
    figures = against.figures.model_copy(update={"rows": tuple(nothing)})
    with pytest.raises(ComparisonError, match="no result"):
        judge(against, replace(against, figures=figures), FAST)


def test_chosen_rows(reference_run: Path) -> None:
    result = gate(reference_run, reference_run, thresholds=FAST, rows=["dense"], progress=False)
    assert {c.row for c in result.checks} == {"dense"}
    with pytest.raises(ComparisonError, match=r"'streamlin'.* 'streamline'"):
        gate(reference_run, reference_run, rows=["streamlin"], progress=False)


def test_other_questions_are_refused(
    reference_run: Path, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    fewer = make_run(tmp_path / "fewer", n=299)
    with pytest.raises(ComparisonError, match=r"'arc'.* 299,.* 300"):
        gate(fewer, reference_run, thresholds=FAST, progress=False)

    def other(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for label in "ABCD":
            entries[7][f"label: {label}"]["prompt"] += "!"
        return entries

    changes = {(row, "arc"): other for row in ("dense", "streamline", "shortgpt")}
    changed = make_run(tmp_path / "changed", changes=changes)
    with pytest.raises(ComparisonError, match=r"'arc'.* 300,.* 300"):
        gate(changed, reference_run, thresholds=FAST, progress=False)


def test_other_methods_of_stability_are_not_compared(reference_run: Path, tmp_path: Path) -> None:
    payload = json.loads((reference_run / "leaderboard.json").read_text())
    payload["method"]["ddof"] = 0
    (tmp_path / "leaderboard.json").write_text(json.dumps(payload))
    result = gate(reference_run, tmp_path, thresholds=FAST, progress=False)
    found = check(result, "streamline", "stability", None)
    assert (found.status, found.reason) == ("not compared", "ddof is 1 here, 0 there")
    payload["method"]["verdict"] = "correct_norm"
    (tmp_path / "leaderboard.json").write_text(json.dumps(payload))
    with pytest.raises(ComparisonError, match=r"'correct',.* 'correct_no"):
        gate(reference_run, tmp_path, progress=False)


def test_what_cannot_be_read(reference_run: Path, tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match=r"leaderboard\.json.* report"):
        gate(tmp_path, reference_run, progress=False)
    with pytest.raises(SamplesError, match=rf"{reference_run.name}.*name one"):
        gate(reference_run.parent, reference_run, progress=False)
    (tmp_path / "leaderboard.json").write_text("{")
    with pytest.raises(SamplesError, match="cannot be read"):
        gate(tmp_path, reference_run, progress=False)
    (tmp_path / "leaderboard.json").write_text("[]")
    with pytest.raises(SamplesError):
        gate(tmp_path, reference_run, progress=False)


def test_answers_that_left_their_report(
    reference_run: Path, tmp_path: Path, opencompass_files: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference_run, run)
    entries = opencompass_files.ppl(40, seed=1)
    opencompass_files.write(run / "streamline" / "eval", "arc", entries)
    with pytest.raises(SamplesError, match=r"'arc'.* 300 .* 40 .*report"):
        gate(run, reference_run, progress=False)


def test_an_evaluation_that_was_made_again(
    reference_run: Path, make_run: Callable[..., Path], spoil: Any, tmp_path: Path
) -> None:
    """As many answers as the leaderboard has, and others: neither side may be such a run."""
    run = make_run(tmp_path / "run", changes={("streamline", "arc"): spoil(1)})
    shutil.copy(reference_run / "leaderboard.json", run / "leaderboard.json")
    for sides in ((run, reference_run), (reference_run, run)):
        with pytest.raises(SamplesError, match=r"'arc'.*'streamline'.*report"):
            gate(*sides, progress=False)


def test_rows_without_their_evaluation_are_named(
    reference_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(reference_run, tmp_path / "run"))
    shutil.rmtree(run / "streamline")
    result = gate(run, reference_run, thresholds=FAST, progress=False)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "'streamline'" in caplog.text and "'shortgpt'" not in caplog.text
    assert check(result, "streamline", "accuracy", "arc").how == "standard errors"
    assert check(result, "shortgpt", "accuracy", "arc").how == "no answer changed"


def test_questions_that_belong_together_widen_the_interval(
    reference_run: Path, spoiled: Path
) -> None:
    """Thirty passages of ten questions: the forty lost answers lie in few of them."""
    run, against = (read_evidence(path, progress=False) for path in (spoiled, reference_run))
    passages = cluster_labels(pd.Series([f"passages:{number // 10}" for number in range(300)]))
    together = replace(run, clusters={("arc", "none"): passages})
    alone, clustered = (judge(side, against, FAST) for side in (run, together))
    for quantity in ("accuracy", "stability"):
        narrow = check(alone, "streamline", quantity, "arc")
        wide = check(clustered, "streamline", quantity, "arc")
        assert narrow.change == wide.change
        assert narrow.low is not None and wide.low is not None and wide.low < narrow.low
