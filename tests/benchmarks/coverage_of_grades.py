"""Coverage of the intervals of paired grades: a Markdown table.

``python tests/benchmarks/coverage_of_grades.py [--repetitions N]``. Grades of a dense model and
what becomes of them are drawn from known distributions; how often does the interval of 95 % hold
the true difference, and how often is no difference rejected at 5 % where there is none?

- ``F1``: 0, 1 or between; a third of the grades moves.
- ``ROUGE``: around 0.3, and every grade moves a little.
- ``rare``: one grade in thirty falls by a half.
- ``clusters``: as ROUGE, in clusters of five that move together (correlation 0.3).
- ``solved``: tokens per solved question, as a ratio to dense; what is hard is hard for both models,
  and what is not solved takes longer. There is no p; no interval where a draw has nothing solved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pandas as pd

from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.clusters import cluster_labels
from streamline_bench.stability.statistics.grades import Pair, PairedGrades, ratio_of_ratios

Floats = npt.NDArray[np.float64]
SIZES = (10, 20, 40, 100, 300)
CLUSTER = 5


def f1(source: np.random.Generator, n: int, drop: float) -> Floats:
    before = np.where(source.random(n) < 0.5, np.round(source.random(n)), source.beta(2, 2, n))
    other = np.where(source.random(n) < 0.5, np.round(source.random(n)), source.beta(2, 2, n))
    moved = np.where(source.random(n) < 1 / 3, other, before) - before
    lost: Floats = np.where(source.random(n) < drop, -before, moved)
    return lost


def rouge(source: np.random.Generator, n: int, drop: float) -> Floats:
    found: Floats = source.beta(3, 7, n) - source.beta(3, 7, n) - drop
    return found


def rare(source: np.random.Generator, n: int, drop: float) -> Floats:
    found: Floats = -0.5 * (source.random(n) < 1 / 30) * (drop > 0)
    return found


def clusters(source: np.random.Generator, n: int, drop: float) -> Floats:
    together = np.repeat(source.normal(0, 0.1, n // CLUSTER), CLUSTER)
    found: Floats = together + source.normal(0, 0.1 * np.sqrt(7 / 3), n) - drop
    return found


KINDS: dict[str, Callable[[np.random.Generator, int, float], Floats]] = {
    "F1": f1, "ROUGE": rouge, "rare": rare, "clusters": clusters,
}  # fmt: skip


def coverage(kind: str, n: int, drop: float, repetitions: int) -> tuple[float, float]:
    """Share of intervals that hold the true difference, share of p below 5 %."""
    source = np.random.default_rng([n, list(KINDS).index(kind), int(1000 * drop)])
    truth = float(KINDS[kind](source, 2_000_000, drop).mean()) if drop or kind == "F1" else 0.0
    held = rejected = 0
    for seed in range(repetitions):
        difference = KINDS[kind](source, n, drop)
        names = pd.Series([f"texts:{index // CLUSTER}" for index in range(n)])
        labels = cluster_labels(names) if kind == "clusters" else None
        test = PairedGrades.of(difference, labels, (kind,), draws=1000, seed=seed)
        found = test.interval(0.95)
        assert found.low is not None and found.high is not None
        held += found.low <= truth <= found.high
        rejected += test.p_value() < 0.05
    return held / repetitions, rejected / repetitions


def solved(source: np.random.Generator, n: int) -> tuple[Pair, Pair]:
    """Tokens and right answers of both models."""
    hard = source.random(n)
    sides = []
    for share, tokens in ((0.7, 20), (0.5, 30)):
        right = (hard + source.normal(0, 0.2, n) < share).astype(np.float64)
        sides.append((1.0 + source.poisson(tokens * (1.5 - right)), right))
    return sides[0], sides[1]


def coverage_of_solved(n: int, repetitions: int) -> tuple[float, float]:
    """Share of intervals that hold the true ratio, share of samples that have an interval."""
    source = np.random.default_rng(n)
    (above, below), (above_now, below_now) = solved(source, 2_000_000)
    truth = above_now.sum() / below_now.sum() / (above.sum() / below.sum())
    held = given = 0
    for seed in range(repetitions):
        settings = Settings(draws=1000, seed=seed)
        found = ratio_of_ratios(*solved(source, n), None, settings, ("solved",))
        if found is not None and found.low is not None:
            given += 1
            held += found.ends[0] <= truth <= found.ends[1]
    return held / max(1, given), given / repetitions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=1000)
    repetitions = parser.parse_args().repetitions
    print("| grades | documents | drop | coverage % | p < 5 %, in % |\n|---|---:|---:|---:|---:|")
    for kind in KINDS:
        for n in SIZES:
            for drop in (0.0, 0.1):
                held, rejected = coverage(kind, n, drop, repetitions)
                print(f"| {kind} | {n} | {drop} | {100 * held:.1f} | {100 * rejected:.1f} |")
    for n in SIZES:
        held, given = coverage_of_solved(n, repetitions)
        print(f"| solved, {100 * given:.1f} % with an interval | {n} | - | {100 * held:.1f} | - |")


if __name__ == "__main__":
    main()
