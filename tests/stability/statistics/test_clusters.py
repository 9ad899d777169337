"""Which documents belong together, and what that does to intervals."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as scipy_t

from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.over_tasks import leaf_tasks
from streamline_bench.stability.readers.lm_eval_rows import TaskConfig, TaskFacts, parse_row
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.clusters import cluster_labels, cluster_of, pooled_labels
from streamline_bench.stability.statistics.stability import choice_spread

FAST = Settings(draws=4000)


@pytest.mark.parametrize(
    ("task", "document", "kind"),
    [
        ("boolq", {"passage": "A."}, "passages"),
        ("local_boolq", {"query": "Passage: A.\nQuestion: b?"}, "passages"),
        ("race", {"article": "A."}, "passages"),
        ("streamline_c3", {"context": ["A.", "B."]}, "passages"),
        ("local_cmmlu", {"subject": "law"}, "subjects"),
        ("mmlu_law", {"subject": "law"}, "subjects"),
        ("piqa", {"passage": "A."}, None),
        ("boolq", {"question": "b?"}, None),
        ("boolq", "no mapping", None),
        ("boolq", None, None),
    ],
)
def test_fields_are_data(task: str, document: object, kind: str | None) -> None:
    found = cluster_of(task, document)
    assert (found is None) == (kind is None)
    if found is not None:
        assert found.startswith(f"{kind}:") and len(found) < 40


def test_what_follows_the_passage_does_not_count() -> None:
    questions = [f"Passage: A.\nQuestion: {word}?" for word in ("b", "c")]
    first, second = (cluster_of("local_boolq", {"query": query}) for query in questions)
    assert first == second
    assert first != cluster_of("local_boolq", {"query": "Passage: B.\nQuestion: b?"})


def test_reader_fills_the_column() -> None:
    facts = TaskFacts("race", "1", TaskConfig())
    line = {
        "doc_id": 0, "target": "0", "doc_hash": "d", "prompt_hash": "p", "target_hash": "t",
        "arguments": {"gen_args_0": {"arg_0": "q", "arg_1": " a"}}, "filter": "none",
        "filtered_resps": [["-1", "False"]], "doc": {"article": "A."},
    }  # fmt: skip
    with_passage, without = (
        parse_row(json.dumps(each).encode(), facts, "f") for each in (line, {**line, "doc": {}})
    )
    assert with_passage.cluster == cluster_of("race", {"article": "A."})
    assert without.cluster is None


def test_labels() -> None:
    found = cluster_labels(pd.Series(["p:a", "p:b", None, "p:a", None], dtype=object))
    assert found is not None
    assert found.labels.tolist() == [0, 1, 2, 0, 3]
    assert (found.shown.kind, found.shown.count, found.shown.largest) == ("p", 4, 2)
    sums = found.sums(np.array([1, 2, 3, 4, 5]), np.ones(5))
    assert sums.tolist() == [[5, 2], [2, 1], [3, 1], [5, 1]]


@pytest.mark.parametrize("names", [["p:a", "p:b"], ["p:a", "p:a"], [None, None], ["p:a"]])
def test_nothing_to_resample(names: list[str | None]) -> None:
    assert cluster_labels(pd.Series(names, dtype=object)) is None


def test_tasks_share_no_cluster() -> None:
    first = cluster_labels(pd.Series(["p:a", "p:a", "p:b"], dtype=object))
    pooled = pooled_labels([(3, first), (2, None), (3, first)])
    assert pooled is not None
    assert pooled.labels.tolist() == [0, 0, 1, 2, 3, 4, 4, 5]
    assert (pooled.shown.kind, pooled.shown.count) == ("p and documents", 6)
    assert pooled_labels([(3, None)]) is None


def test_intervals_over_passages_are_those_of_resampling_passages(
    pair: Callable[..., tuple[Samples, Samples]],
) -> None:
    dense, pruned = pair({"t": (400, 8)}, noise=2.0)
    found = compare_answers(dense, pruned, settings=FAST).tasks[0]
    right, now = (samples.frame["correct"].to_numpy(dtype=int) for samples in (dense, pruned))
    source = np.random.default_rng(1)
    drawn = source.integers(50, size=(4000, 50))
    by_passage = {
        "right": right.reshape(50, 8).sum(axis=1)[drawn].sum(axis=1),
        "now": now.reshape(50, 8).sum(axis=1)[drawn].sum(axis=1),
        "same": (right == now).reshape(50, 8).sum(axis=1)[drawn].sum(axis=1),
    }
    assert found.clusters is not None and found.clusters.count == 50
    for estimate, brute in (
        (found.difference, (by_passage["now"] - by_passage["right"]) / 400),
        (found.agreement, by_passage["same"] / 400),
        (found.retention, by_passage["now"] / by_passage["right"]),
    ):
        assert estimate is not None
        low, high = np.quantile(brute, [0.025, 0.975])
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.015)
    weights = np.exp(choice_spread(dense.frame))
    both = (weights * (right == now)).reshape(50, 8).sum(axis=1)[drawn].sum(axis=1)
    ratios = both / weights.reshape(50, 8).sum(axis=1)[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    assert found.stability is not None
    assert (found.stability.low, found.stability.high) == pytest.approx((low, high), abs=0.012)
    assert found.difference.method == "Tango's score over 50 passages"
    assert found.p_method == "McNemar over 50 passages, score"
    assert found.p_value is not None and found.p_value > found.mcnemar_p


def test_clusters_widen_every_interval(pair: Callable[..., tuple[Samples, Samples]]) -> None:
    dense, pruned = pair({"t": (400, 8)}, noise=2.0)
    together = compare_answers(dense, pruned, settings=FAST)
    alone = compare_answers(
        Samples(dense.frame.assign(cluster=None), dense.info),
        Samples(pruned.frame.assign(cluster=None), pruned.info),
        settings=FAST,
    )
    for one, other in ((together.tasks[0], alone.tasks[0]), (together.micro, alone.micro)):
        for name in ("difference", "retention"):
            wide, narrow = getattr(one, name), getattr(other, name)
            assert wide.value == pytest.approx(narrow.value)
            assert wide.high - wide.low > 1.2 * (narrow.high - narrow.low), name
        assert one.detectable > other.detectable
    for name in ("kl", "margin_shift"):
        wide = getattr(together.tasks[0].choices, name)
        narrow = getattr(alone.tasks[0].choices, name)
        assert wide.standard_error > narrow.standard_error
    assert together.micro.clusters is not None and together.micro.clusters.kind == "passages"


def test_a_group_has_its_tasks_as_clusters(pair: Callable[..., tuple[Samples, Samples]]) -> None:
    groups = {"all": ["law", "rest"], "rest": ["art", "sport", "all"], "none": ["other"]}
    tasks = {"law": (50, None), "art": (80, None), "sport": (30, None)}
    dense, pruned = pair(tasks, noise=3.0, groups=groups)
    found = compare_answers(dense, pruned, settings=FAST)
    assert [group.group for group in found.groups] == ["all", "rest"]
    group = found.groups[0]
    assert group.tasks == ("law", "art", "sport") and group.n == 160
    assert group.difference.value == pytest.approx(found.micro.difference.value)
    counts = {t.task: (t.n, round(t.n * (t.pruned.value - t.dense.value))) for t in found.tasks}
    n, moved = np.array([counts[task] for task in group.tasks]).T
    share, residual = n / 160, moved - n * moved.sum() / 160
    within = (residual**2 / (1 - share)).sum()
    assert group.difference.standard_error == pytest.approx(np.sqrt(within) / 160, rel=0.05)
    assert group.difference.method == "Tango's score over 3 tasks"
    assert group.p_method == "McNemar over 3 tasks, score"
    # Three tasks of unequal size: fewer than two degrees of freedom, which widen the interval.
    half = scipy_t.ppf(0.975, 2) * group.difference.standard_error
    assert group.difference.high - group.difference.low > 2 * half
    assert group.p_holm is not None and group.p_value is not None
    assert group.p_holm == pytest.approx(min(1.0, 2 * group.p_value), abs=0.3)
    assert group.decision is not None


def test_few_flips_in_many_clusters_are_nearly_those_of_documents(
    questions: Callable[..., Samples],
) -> None:
    """Two answers gained in 60 passages: no draw of passages loses any, but that proves nothing."""
    right, wrong = [-1.0, -2.0], [-2.0, -1.0]
    clusters = [f"passages:{index // 3}" for index in range(180)]
    dense = [right, wrong] * 90
    pruned = [right] * 4 + dense[4:]
    found, alone = (
        compare_answers(
            questions("dense", {"t": (dense, [0] * 180, labels)}),
            questions("pruned", {"t": (pruned, [0] * 180, labels)}),
            settings=FAST,
        ).tasks[0]
        for labels in (clusters, None)
    )
    assert found.difference.low < 0 < found.difference.high
    assert found.difference.low == pytest.approx(alone.difference.low, abs=1e-3)
    assert found.difference.high == pytest.approx(alone.difference.high, abs=2e-3)
    assert found.decision == alone.decision
    same = [questions(run, {"t": (dense, [0] * 180, clusters)}) for run in ("dense", "again")]
    unchanged = compare_answers(*same, settings=FAST).tasks[0]
    assert unchanged.difference.low < 0 < unchanged.difference.high
    assert unchanged.clusters is not None


def test_errors_of_accuracies_are_statsmodels_cluster_robust_ones(
    pair: Callable[..., tuple[Samples, Samples]],
) -> None:
    from statsmodels.api import OLS

    dense, pruned = pair({"t": (400, 10), "u": (100, None)}, noise=2.0)
    result = compare_answers(dense, pruned, settings=FAST)

    def error(values: np.ndarray, groups: np.ndarray) -> float:
        how = {"groups": groups, "use_correction": True}
        return float(OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds=how).bse[0])

    rows = (pruned.frame["task"] == "t").to_numpy()
    labels = np.where(rows, np.arange(500) // 10, 1000 + np.arange(500))
    for side, samples in (("dense", dense), ("pruned", pruned)):
        right = samples.frame["correct"].to_numpy(dtype=float)
        first, second = (getattr(task, side).standard_error for task in result.tasks)
        assert first == pytest.approx(error(right[rows], labels[rows]))
        assert second == pytest.approx(right[~rows].std(ddof=1) / 10)
        micro, macro = getattr(result.micro, side), getattr(result.macro, side)
        assert micro.standard_error == pytest.approx(error(right, labels))
        assert macro.standard_error == pytest.approx(np.hypot(first, second) / 2)
        corrected = getattr(result.tasks[0], f"{side}_corrected")
        assert corrected.standard_error == pytest.approx(first / 0.75)
    assert result.tasks[0].pruned.standard_error > 1.3 * right[rows].std() / 20


def test_groups_that_contain_themselves_end() -> None:
    groups = {"a": ["b", "x"], "b": ["a", "y", "x"], "empty": []}
    assert leaf_tasks("a", groups) == ["y", "x"]
    assert leaf_tasks("empty", groups) == ["empty"]
