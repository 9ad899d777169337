"""Rows against each other: folded over seeds, ranked, and tested on the same documents."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from streamline_bench.report.figures.sizes import interpolated
from streamline_bench.report.frame import results
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.row import Row
from streamline_bench.report.standing import Answers, TaskAnswers, standing
from streamline_bench.report.text import MISSING
from streamline_bench.report.views.entries import shown
from streamline_bench.report.views.headline import headline
from streamline_bench.report.views.page import to_html
from streamline_bench.report.views.variance import variance_lines
from streamline_bench.stability.comparison import GradedMetric
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.crossed import CrossedTask, crossed_estimate
from streamline_bench.stability.statistics.paired import Outcomes, PairedSample
from streamline_bench.stability.statistics.score import PairedDifference
from streamline_bench.stability.texts import MeasuredDivergence
from streamline_bench.throughput.speed import Speed

SETTINGS = Settings(draws=100)
N = 400
ASKED = np.random.default_rng(0)
HARD = ASKED.random(N)
DENSE = HARD < 0.9


def answered(skill: float, seed: int, documents: str = "") -> Answers:
    """Verdicts of a model on two tasks; what is hard is hard for all."""
    noise = np.random.default_rng(seed).normal(0, 0.1, N)
    right = noise + HARD < skill
    named = tuple(f"{documents}{index}" for index in range(N))
    return {
        task: TaskAnswers(named[part], right[part], DENSE[part], None, np.ones(N // 2))
        for task, part in (("a", slice(0, N // 2)), ("b", slice(N // 2, N)))
    }


def row(label: str, parameters: int | None = 750, **fields: Any) -> Row:
    given = {"cost": "calibrated", **fields}
    return Row.model_validate(
        {"label": label, "is_dense": label == "dense", "parameters": parameters,
         "accuracy_macro": {"value": 0.5}, "accuracy_micro": None, "macro": None,
         "micro": None, "tasks": [],
         "provenance": {"results_file": None, "model": None, "engine": None}, **given}
    )  # fmt: skip


DENSE_ROW = row("dense", 1000, cost=None)


def stand(skills: dict[str, float], **fields: dict[str, Any]) -> Any:
    rows = [row(label, **fields.get(label, {})) for label in skills]
    answers = {label: answered(skill, seed) for seed, (label, skill) in enumerate(skills.items())}
    return standing([DENSE_ROW, *rows], answers, SETTINGS), answers


def outcomes(first: Answers, second: Answers) -> PairedDifference:
    """Pairs counted one by one: the second is the base."""
    samples = []
    for task in first:
        counts = [0, 0, 0, 0]
        for one, two in zip(second[task].right, first[task].right, strict=True):
            counts[2 * (not one) + (not two)] += 1
        samples.append(PairedSample(Outcomes(*counts)))
    return PairedDifference(tuple(samples))


def test_neighbours_are_tested_on_the_same_documents() -> None:
    found, answers = stand({"x": 0.5, "best": 0.8, "y": 0.505})
    assert [(pair.first, pair.second) for pair in found.neighbours] == [("best", "y"), ("y", "x")]
    pair, wanted = found.neighbours[0], outcomes(answers["best"], answers["y"])
    assert pair.difference.value == pytest.approx(wanted.value)
    assert pair.p_value == pytest.approx(wanted.p_value()) and pair.p_holm <= 2 * pair.p_value
    apart = sum((answers["best"][t].right != answers["y"][t].right).sum() for t in "ab")
    assert pair.discordance == pytest.approx(apart / N) and pair.n == N
    assert pair.needed == wanted.needed(0.95)
    assert found.neighbours[1].p_holm >= 0.05


def test_every_entry_has_a_rank_with_an_interval() -> None:
    found, _ = stand({"x": 0.5, "best": 0.8, "y": 0.505})
    assert {label: rank.place for label, rank in found.ranks.items()} == {"best": 1, "y": 2, "x": 3}
    assert (found.ranks["best"].low, found.ranks["best"].high) == (1, 1)
    assert (found.ranks["y"].low, found.ranks["y"].high) == (2, 3)
    assert "dense" not in found.ranks


def test_every_size_has_ranks_of_its_own() -> None:
    rows, answers = [], {}
    for number, (label, size, skill) in enumerate((
        ("a", 0.25, 0.8), ("b", 0.25, 0.6), ("a", 0.5, 0.3), ("b", 0.5, 0.5), ("c", 0.4, 0.7),
        ("plain", None, 0.9),
    )):  # fmt: skip
        axes = {} if size is None else {"sparsity": size}
        name = label if size is None else f"{label}-{size}"
        rows.append(row(name, group=label, axes=axes))
        answers[name] = answered(skill, number)
    found = standing([DENSE_ROW, *rows], answers, SETTINGS)
    places = {label: (rank.place, rank.low, rank.high) for label, rank in found.ranks.items()}
    assert places == {"a-0.25": (1, 1, 1), "b-0.25": (2, 2, 2),
                      "b-0.5": (1, 1, 1), "a-0.5": (2, 2, 2)}  # fmt: skip
    pairs = {(pair.first, pair.second) for pair in found.neighbours}
    assert pairs == {("a-0.25", "b-0.25"), ("b-0.5", "a-0.5")}


def test_a_leader_is_named_among_equal_size_and_cost_only() -> None:
    skills = {"a": 0.8, "b": 0.6, "larger": 0.85, "dear": 0.86, "unknown": 0.87}
    found, answers = stand(
        skills,
        larger={"parameters": 771},
        dear={"cost": "recovered"},
        unknown={"parameters": None},
    )
    assert [contest.entries for contest in found.contests] == [["a", "b"]]
    contest = found.contests[0]
    assert contest.removed == pytest.approx((0.25, 0.25)) and contest.cost == "calibrated"
    test = contest.tests[0]
    assert test.difference.value == pytest.approx(outcomes(answers["a"], answers["b"]).value)


def test_a_contest_is_around_its_leader() -> None:
    """Not around its smallest model: brute force over all orders of sizes and skills."""
    sizes = {"a": 740, "b": 758, "c": 755, "d": 772, "e": 790}
    for shift in range(len(sizes)):
        skills = {name: 0.3 + 0.1 * ((place + shift) % 5) for place, name in enumerate(sizes)}
        found, _ = stand(skills, **{name: {"parameters": size} for name, size in sizes.items()})
        left = sorted(skills, key=skills.__getitem__, reverse=True)
        wanted = []
        while left:
            near = [name for name in left if abs(sizes[name] - sizes[left[0]]) <= 20]
            left = [name for name in left if name not in near]
            wanted += [near] if len(near) > 1 else []
        wanted.sort(key=lambda group: -len(group))
        assert [contest.entries for contest in found.contests] == wanted, skills


def test_bytes_tell_sizes_apart() -> None:
    quantised = {"parameters": 750, "bytes": 400}
    found, _ = stand(
        {"a": 0.8, "b": 0.6, "c": 0.7}, a=quantised, b={"bytes": 1500}, c={"bytes": 1510}
    )
    assert [contest.entries for contest in found.contests] == [["c", "b"]]


def test_a_small_dense_model_meets_the_pruned_large_one() -> None:
    small = row("small", 745).model_copy(update={"is_dense": True, "cost": None})
    rows = [row("a"), row("b", cost="recovered"), small]
    answers = {one.label: answered(0.6, seed) for seed, one in enumerate(rows)}
    answers["small"] = answered(0.8, 9)
    found = standing([DENSE_ROW, *rows], answers, SETTINGS)
    assert sorted((one.cost, one.entries) for one in found.contests) == [
        ("calibrated", ["small", "a"]), ("recovered", ["small", "b"]),
    ]  # fmt: skip
    assert found.ranks["small"].place == 1


def test_the_order_of_the_rows_changes_nothing() -> None:
    """So that a merged board is that of one run."""
    rows = [row(f"r-{seed}", group="r", axes={"seed": seed}) for seed in range(3)]
    rows += [row("x"), row("a"), row("b")]
    answers = {one.label: answered(0.5, seed % 4) for seed, one in enumerate(rows)}
    forwards = standing([DENSE_ROW, *rows], answers, SETTINGS)
    assert standing([DENSE_ROW, *reversed(rows)], answers, SETTINGS) == forwards


def test_rows_that_were_asked_other_documents_are_left_out() -> None:
    answers = {"a": answered(0.8, 0), "b": answered(0.7, 1), "c": answered(0.6, 2, "other ")}
    found = standing([DENSE_ROW, *map(row, answers)], answers, SETTINGS)
    assert list(found.ranks) == ["a", "b"]


def seeds(count: int = 3, texts: tuple[str, ...] = ("one", "two"), lost: bool = False) -> Any:
    rows, answers = [], {}
    for seed in range(count):
        for text in texts:
            label = f"r-{seed}-{text}"
            axes = {"sparsity": 0.25, "seed": seed, "calibration": text}
            rows.append(row(label, group="r", axes=axes))
            answers[label] = answered(0.6 + 0.05 * seed, 7 * seed + len(text) + (text == "two"))
    rows.append(row("plain"))
    answers["plain"] = answered(0.5, 99)
    if lost:
        del answers["r-0-one"]
    return standing([DENSE_ROW, *rows], answers, SETTINGS), answers


def test_seeds_and_calibrations_fold_into_one_entry() -> None:
    found, answers = seeds()
    label = "r (sparsity 0.25)"
    assert list(found.ranks) == [label, "plain"]
    folded = found.folded[0]
    assert folded.label == label and len(folded.members) == 6
    scores = [
        np.array([[answers[f"r-{s}-{t}"][task].right for t in ("one", "two")] for s in range(3)])
        for task in "ab"
    ]
    wanted, parts = crossed_estimate([CrossedTask(each.astype(float)) for each in scores])
    assert folded.accuracy.value == pytest.approx(wanted.value)
    assert folded.accuracy.low == pytest.approx(max(0.0, wanted.low))
    assert folded.accuracy.high <= 1 and folded.difference.low >= -1, "shares"
    assert folded.variance == parts and parts.seed > 0
    dense = np.mean([DENSE[: N // 2].mean(), DENSE[N // 2 :].mean()])
    assert folded.difference.value == pytest.approx(wanted.value - dense)
    agree = np.mean([(each == DENSE[i * N // 2 : (i + 1) * N // 2]).mean()
                     for i, each in enumerate(scores)])  # fmt: skip
    assert folded.stability.value == pytest.approx(agree)
    assert found.neighbours[0].p_method.startswith("Student")


def test_a_grid_with_a_hole_stays_apart() -> None:
    found, _ = seeds(lost=True)
    assert not found.folded and len(found.ranks) == 6


HALF = {"value": 0.5}
MACRO = {
    "difference": HALF, "tasks": 1, "n": 5, "stability_tasks": 0, "dense": HALF, "pruned": HALF,
    "agreement": HALF, "stability": None,
    "flips": {"right_to_wrong": 0, "wrong_to_right": 0, "wrong_to_other_wrong": None},
}  # fmt: skip


def board(found: Any, rows: list[Row] | None = None) -> Leaderboard:
    shown = rows or [row(label, macro=MACRO) for label in found.ranks]
    return Leaderboard.model_validate(
        {"title": "t", "dense": "dense", "rows": [one.model_dump() for one in [DENSE_ROW, *shown]],
         "method": SETTINGS.used(), "ranks": found.ranks, "neighbours": found.neighbours,
         "contests": found.contests, "folded": found.folded, "versions": {"streamline-bench": "0"}}
    )  # fmt: skip


def test_the_headline_names_a_winner_that_the_test_finds() -> None:
    found, _ = stand({"a": 0.8, "b": 0.6})
    text = headline(board(found))
    assert "a is first" in text and "25.0 % removed" in text and "calibrated" in text


def test_the_headline_says_what_it_would_take() -> None:
    found, _ = stand({"a": 0.63, "b": 0.6, "far": 0.2})
    text = headline(board(found))
    assert "cannot be told apart from b" in text and "far" not in text
    test = found.contests[0].tests[0]
    digits = max(0, len(str(test.needed)) - 2)
    rounded = -(-test.needed // 10**digits) * 10**digits
    assert f"{rounded:,} documents" in text and f"{N:,} were asked" in text


def test_the_headline_of_rows_without_tests_names_no_winner() -> None:
    found, _ = stand({"a": 0.8, "b": 0.6})
    shown = board(found).model_copy(update={"contests": [], "ranks": {}, "neighbours": []})
    assert "not tested" in headline(shown)


def test_folded_rows_are_one_row_of_the_page() -> None:
    """At three sizes and beside another recipe, so that there are curves and equal sizes."""
    rows, answers = [], {}
    for sparsity in (0.125, 0.25, 0.5):
        for group, skill in (("r", 0.9), ("q <u>", 0.7)):
            for seed in range(3):
                label = f"{group}-{sparsity}-{seed}"
                axes = {"sparsity": sparsity, "seed": seed}
                parameters = round(1000 * (1 - sparsity))
                rows.append(
                    row(label, parameters, group=group, axes=axes, macro=MACRO, micro=MACRO)
                )
                answers[label] = answered(skill - sparsity, 10 * seed + int(8 * sparsity))
    found = standing([DENSE_ROW, *rows], answers, SETTINGS)
    shown = board(found, rows)
    page = to_html(shown)
    assert found.folded[0].label == "r (sparsity 0.125)"
    assert page.count('class="board') == 1
    ranking = page.partition('id="leaderboard"')[2].partition("</table>")[0]
    assert ranking.count("<tr data-row") == 1 + 6 and "r-0.25-1" not in ranking
    assert "Where the variance comes from" in page and len(found.folded) == 6
    assert page.count('class="sizes"') >= 1 and "<u>" not in page
    equal = page.partition("At equal size")[2].partition("</table>")[0]
    assert "12.5 % removed" in equal and "50.0 % removed" in equal
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "r-0.25-1" in page, "every run is described"
    frame = results(shown)
    variance = frame[(frame.row == "r (sparsity 0.25)") & (frame.metric == "variance: seed")]
    assert variance.value.tolist() == [
        next(fold for fold in found.folded if fold.label == "r (sparsity 0.25)").variance.seed
    ]


def test_runs_of_the_same_weights_complete_a_grid() -> None:
    """A seed that changes nothing counts as a run like the others."""
    twin = {"label": "r-1", "group": "r", "axes": {"seed": 1}}
    rows = [row(f"r-{seed}", group="r", axes={"seed": seed}) for seed in (0, 2)]
    rows[0] = rows[0].model_copy(update={"same_weights": [SimpleNamespace(**twin)]})
    answers = {one.label: answered(0.7, seed) for seed, one in enumerate(rows)}
    found = standing([DENSE_ROW, *rows], answers, SETTINGS)
    assert found.folded[0].members == ["r-0", "r-1", "r-2"]
    assert found.folded[0].variance.seeds == 3


def test_runs_that_are_all_another_row_are_no_entry_of_their_own() -> None:
    twins = [{"label": f"r-{seed}", "group": "r", "axes": {"seed": seed}} for seed in range(2)]
    own = row("s-0", group="s", axes={"seed": 0})
    same = {"label": "s-1", "group": "s", "axes": {"seed": 1}}
    rows = [
        row("u").model_copy(update={"same_weights": [SimpleNamespace(**one) for one in twins]}),
        own.model_copy(update={"same_weights": [SimpleNamespace(**same)]}),
        row("v"),
    ]
    answers = {one.label: answered(0.7, seed) for seed, one in enumerate(rows)}
    found = standing([DENSE_ROW, *rows], answers, SETTINGS)
    assert found.folded == [] and sorted(found.ranks) == ["s-0", "u", "v"]
    assert len(found.contests[0].tests) == 2, "none is tested twice"


def test_divergences_of_a_folded_row_are_crossed_by_document() -> None:
    tokens = np.array([5, 9, 30, 6])
    nats = np.array([[0.3, 0.1, 0.2, 0.5], [1.9, 1.4, 1.1, 2.0]]) * tokens
    rows = []
    for seed, sums in enumerate(nats):
        kl = {"value": sums.sum() / tokens.sum(), "low": 0.0, "high": 9.0, "standard_error": 0.1}
        text = MeasuredDivergence(
            documents=4, windows=4, tokens=50, window=30, same_top=HALF, kl=kl, nats_per_token=kl,
            dense_perplexity=5.0, pruned_perplexity=6.0,
            by_document=tuple(zip(tokens.tolist(), sums.tolist(), strict=True)),
        )  # fmt: skip
        rows.append(row(f"r-{seed}", group="r", axes={"seed": seed}, divergence=text, macro=MACRO))
    answers = {one.label: answered(0.7, seed) for seed, one in enumerate(rows)}
    found = standing([DENSE_ROW, *rows], answers, SETTINGS)
    (fold,) = found.folded
    wanted, parts = crossed_estimate([CrossedTask((nats / tokens)[:, None], weights=tokens)])
    assert fold.token_kl.value == pytest.approx(nats.sum(axis=1).mean() / tokens.sum())
    assert wanted.low < 0 == fold.token_kl.low and fold.token_kl.high == wanted.high
    assert fold.token_kl_variance == parts and fold.stability_variance is not None
    line = next(one for one in variance_lines(board(found, rows)) if "KL" in one.quantity)
    between, limit = (math.sqrt(each) for each in (parts.seed, parts.limits["seed"]))
    assert line.runs == "2 \N{MULTIPLICATION SIGN} 1"
    assert line.parts[1:] == [f"{between:.2f} < {limit:.2f}", MISSING, MISSING]
    cells = variance_lines(board(found, rows))[0].parts
    assert re.fullmatch(r"([\d.]+ )?< [\d.]+", cells[1]), "accuracy never shows a bare 0"
    # Without documents there is an interval of the runs, which stays above 0, too.
    plain = [one.model_copy(update={"divergence": one.divergence.model_copy(
        update={"by_document": ()})}) for one in rows]  # fmt: skip
    (fold,) = standing([DENSE_ROW, *plain], answers, SETTINGS).folded
    assert fold.token_kl.low == 0 and fold.token_kl_variance is None


def test_seconds_of_a_folded_row_are_those_of_a_run() -> None:
    rows = [
        row(f"r-{seed}", group="r", axes={"seed": seed}, macro=MACRO, seconds={"compress": spent})
        for seed, spent in enumerate((10.0, 20.0))
    ]
    answers = {one.label: answered(0.7, seed) for seed, one in enumerate(rows)}
    found = board(standing([DENSE_ROW, *rows], answers, SETTINGS), rows)
    (folded,) = (one for one in shown(found) if not one.is_dense)
    assert folded.total_seconds == pytest.approx(15.0)


def test_what_lies_between_own_sizes_is_interpolated_and_nothing_beyond() -> None:
    points = [
        (0.1, Estimate(value=0.8, low=0.7, high=0.9)),
        (0.3, Estimate(value=0.4, low=0.2, high=0.6)),
    ]
    found = interpolated(points, 0.15)
    assert (found.value, found.low, found.high) == pytest.approx((0.7, 0.575, 0.825))
    assert interpolated(points, 0.3).value == pytest.approx(0.4)
    assert interpolated(points, 0.33) is None and interpolated(points, 0.05) is None
    assert interpolated(points, 0.31) == points[1][1], "within 2 % of the parameters"


def test_ranks_by_grades_against_a_bootstrap() -> None:
    source = np.random.default_rng(4)
    named = tuple(map(str, range(N)))
    base = source.beta(3, 4, N)
    grades: dict[str, Answers] = {}
    for label, drop in (("one", 0.0), ("two", 0.02), ("three", 0.1)):
        share = np.clip(base - drop + source.normal(0, 0.05, N), 0, 1)
        grades[label] = {  # the same in per cent, as ROUGE has it
            "f1": TaskAnswers(named, share, base, None, None),
            "rouge": TaskAnswers(named, 100 * share, 100 * base, None, None),
        }
    rows = [DENSE_ROW, *map(row, grades)]
    found = standing(rows, {}, SETTINGS, grades)
    assert found.ranks == {}
    assert [found.grade_ranks[label].place for label in grades] == [1, 2, 3]
    scores = np.array([grades[label]["f1"].right for label in grades])
    # Both tasks are drawn by themselves.
    drawn = sum(scores[:, source.integers(N, size=(4000, N))].mean(axis=2) for _ in range(2))
    places = 1 + (drawn[:, None] < drawn[None]).sum(axis=1)
    for label, place in zip(grades, places, strict=True):
        rank = found.grade_ranks[label]
        assert (rank.low, rank.high) == tuple(np.quantile(place, [0.025, 0.975]))
        assert rank.first == pytest.approx((place == 1).mean(), abs=0.03)


def test_grades_of_folded_rows_are_their_means() -> None:
    comparison = {
        "task": "s", "filter": "none", "metric": "rouge1", "kind": "grade", "decides": True,
        "n": 9, "wins": 1, "ties": 5, "losses": 3, "p_value": 0.2, "p_holm": 0.2,
        "decision": "cannot tell",
    }  # fmt: skip
    named = {name: comparison[name] for name in GradedMetric.model_fields if name in comparison}
    rows = []
    for seed, grade in enumerate((0.2, 0.4)):
        means = {"dense": {"value": 0.5}, "pruned": {"value": grade},
                 "difference": {"value": grade - 0.5, "low": -0.6, "high": 0.1}}  # fmt: skip
        score = {**named, "main": True, "value": {"value": grade},
                 "comparison": {**comparison, **means}}  # fmt: skip
        fields = {"group": "r", "axes": {"seed": seed}, "macro": MACRO, "micro": MACRO}
        rows.append(row(f"r-{seed}", grades=[score], **fields))
    answers = {each.label: answered(0.6, seed) for seed, each in enumerate(rows)}
    (folded,) = (
        each
        for each in shown(board(standing([DENSE_ROW, *rows], answers, SETTINGS), rows))
        if not each.is_dense
    )
    (score,) = folded.grades
    assert score.comparison is not None and score.comparison.difference is not None
    assert score.value.value == pytest.approx(0.3)
    assert score.comparison.difference.value == pytest.approx(-0.2)
    assert score.comparison.difference.low is None
    assert score.comparison.decision is None and score.comparison.p_holm is None


def test_rows_stand_on_fronts_with_a_share_of_the_resamples() -> None:
    skills = {"large": 0.85, "small": 0.5, "beaten": 0.3, "close": 0.502}
    sizes = {"large": 800, "small": 400, "beaten": 600, "close": 401}
    fields = {label: {"bytes": size, "memory": 2 * size} for label, size in sizes.items()}
    rows = [row(label, **fields[label]) for label in skills]
    dense = DENSE_ROW.model_copy(update={"bytes": 1000, "memory": 2000})
    answers = {label: answered(skill, seed) for seed, (label, skill) in enumerate(skills.items())}
    assert standing([dense, *rows], answers, SETTINGS).fronts == []
    found = standing([dense, *rows], answers, SETTINGS, with_fronts=True).fronts
    assert [front.measure for front in found] == ["memory", "bytes"]
    places = {place.label: place for place in found[1].places}
    assert list(places) == ["small", "close", "beaten", "large", "dense"]
    assert places["small"].on and places["small"].share == 1.0  # nothing is cheaper
    assert not places["beaten"].on and places["beaten"].share == 0.0
    assert places["dense"].on and places["dense"].accuracy == pytest.approx(DENSE.mean())
    assert 0.05 < places["close"].share < 0.95
    # A time is drawn by its error: far behind small and a little dearer than large.
    speed = {"engine": "e", "device": "cpu", "dtype": "float32", "batch_size": 1, "status": "ok"}
    timed = [
        one.model_copy(update={"throughput": Speed(ratio=ratio, ratio_error=error, **speed)})
        for one, ratio, error in zip(rows, (1.5, 2.0, 1.49, 2.5), (0.01,) * 4, strict=True)
    ]
    dense = dense.model_copy(update={"throughput": Speed(**speed)})
    time = standing([dense, *timed], answers, SETTINGS, with_fronts=True).fronts[1]
    assert time.measure == "time" and time.places[-1].cost == 1.0
    assert 0.1 < {p.label: p.share for p in time.places}["small"] < 0.9
