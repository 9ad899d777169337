"""Coverage and power of the paired test, with and without clusters: a Markdown table.

``python tests/benchmarks/coverage_of_intervals.py [--repetitions N] [--most N] [--output FILE]``.
Without clusters every outcome of n documents is counted with its chance, so that coverage and power
are exact. With clusters they are simulated: the flips of a cluster are multinomial with shares that
vary by a Dirichlet distribution (intraclass correlation 0, 0.1 or 0.3), sizes are equal or
log-normal. Seeds depend on the scenario only. ``--output`` keeps finished rows as JSON lines, and a
later run with the same file continues there.

Power is the chance to find a difference. "Former" is that of the procedure that this one replaced,
for documents without clusters: the exact conditional test, mid-p below 25 flips, and Newcombe's
interval; both had to exclude 0.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.special import gammaln
from scipy.stats import binom, norm

from streamline_bench.stability.statistics.paired import Outcomes, PairedSample
from streamline_bench.stability.statistics.score import PairedDifference

Scenario = dict[str, float]


def scenarios() -> Iterator[Scenario]:
    """Documents alone, then clusters: ``psi`` is the share of flips, ``slant`` its imbalance."""
    for n in (10, 20, 50, 100, 300, 1000, 2000):
        for psi in (0.02, 0.1, 0.3):
            for slant in (0.0, 0.5, 0.9):
                yield {"n": n, "psi": psi, "slant": slant}
    for clusters, size in ((5, 20), (8, 10), (15, 20), (30, 4), (60, 4), (100, 20), (400, 5)):
        for uneven in (0.0, 1.0):
            for together in (0.0, 0.1, 0.3):
                for psi, slant in ((0.1, 0.0), (0.3, 0.5)):
                    yield {"n": clusters * size, "clusters": clusters, "uneven": uneven,
                           "together": together, "psi": psi, "slant": slant}  # fmt: skip


def shares(scenario: Scenario) -> tuple[float, float]:
    """Lost and gained."""
    psi, slant = scenario["psi"], scenario["slant"]
    return psi * (1 + slant) / 2, psi * (1 - slant) / 2


def outcomes_with_chances(n: int, lost: float, gained: float) -> Iterator[tuple[int, int, float]]:
    """Every (lost, gained) of n documents within eight standard deviations."""

    def near(p: float) -> range:
        half = 8 * math.sqrt(n * p) + 5
        return range(max(0, int(n * p - half)), min(n, int(n * p + half)) + 1)

    for b in near(lost):
        for c in near(gained):
            if b + c <= n:
                ways = gammaln(n + 1) - gammaln(b + 1) - gammaln(c + 1) - gammaln(n - b - c + 1)
                chance = math.exp(ways + b * math.log(lost) + c * math.log(gained)
                                  + (n - b - c) * math.log1p(-lost - gained))  # fmt: skip
                if chance > 1e-10:
                    yield b, c, chance


def former(n: int, b: int, c: int) -> bool:
    """Whether the procedure of version 0.1 found a difference (half of the others were right)."""
    if b == c:
        return False
    flips, right = b + c, (n - b - c) // 2
    p = min(1.0, 2 * binom.cdf(min(b, c), flips, 0.5) - (binom.pmf(b, flips, 0.5) if flips < 25
                                                         else 0))  # fmt: skip
    if p >= 0.05:
        return False
    z, dense, pruned = norm.ppf(0.975), (right + b) / n, (right + c) / n

    def wilson(share: float) -> tuple[float, float]:
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return centre - half, centre + half

    wrong = n - right - b - c
    margins = (right + b) * (c + wrong) * (right + c) * (b + wrong)
    product = right * wrong - b * c
    product = max(0.0, product - n / 2) if product > 0 else product
    phi = product / math.sqrt(margins) if margins else 0.0
    (low1, high1), (low2, high2) = wilson(pruned), wilson(dense)
    x, y = (pruned - low1, high2 - dense) if c > b else (high1 - pruned, dense - low2)
    return abs(pruned - dense) > math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))


def alone(scenario: Scenario) -> dict[str, float]:
    """Exact coverage and power, without clusters."""
    n, (lost, gained) = int(scenario["n"]), shares(scenario)
    covered = power = before = 0.0
    for b, c, chance in outcomes_with_chances(n, lost, gained):
        found = PairedDifference((PairedSample(Outcomes(n - b - c, b, c, 0)),))
        covered += chance * (found.p_value(gained - lost) >= 0.05)
        power += chance * (found.p_value() < 0.05)
        before += chance * former(n, b, c)
    return {"coverage": covered, "power": power, "former_power": before}


def clustered(scenario: Scenario, repetitions: int) -> dict[str, float]:
    """Simulated coverage and power, with clusters."""
    name = json.dumps(scenario, sort_keys=True)
    source = np.random.default_rng(zlib.crc32(name.encode()))
    clusters, together = int(scenario["clusters"]), scenario["together"]
    lost, gained = shares(scenario)
    parts = np.array([lost, gained, 1 - lost - gained])
    covered = power = 0
    for _ in range(repetitions):
        sizes = source.lognormal(0.0, scenario["uneven"], size=clusters)
        sizes = np.maximum(1, np.rint(sizes / sizes.mean() * scenario["n"] / clusters)).astype(int)
        rows = np.tile(parts, (clusters, 1))
        if together:
            rows = source.dirichlet(parts * (1 - together) / together, size=clusters)
        drawn = source.multinomial(sizes, rows)
        b, c, same = drawn.T
        table = np.stack([sizes, same + b, same + c, same], axis=1).astype(float)
        outcomes = Outcomes(int(same.sum()), int(b.sum()), int(c.sum()), 0)
        found = PairedDifference((PairedSample(outcomes, (table,), "clusters"),))
        covered += found.p_value(gained - lost) >= 0.05
        power += found.p_value() < 0.05
    return {"coverage": covered / repetitions, "power": power / repetitions}


def line(scenario: Scenario, found: dict[str, float]) -> str:
    """One row of the table."""
    sizes = ("-" if "clusters" not in scenario
             else f"{scenario['clusters']:g} {'unequal' if scenario['uneven'] else 'equal'}, "
             f"correlation {scenario['together']:g}")  # fmt: skip
    before = f"{100 * found['former_power']:.1f}" if "former_power" in found else "-"
    return (
        f"| {scenario['n']:g} | {sizes} | {scenario['n'] * scenario['psi']:g} | "
        f"{scenario['slant']:g} | {100 * found['coverage']:.1f} | {100 * found['power']:.1f} | "
        f"{before} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--most", type=int, help="scenarios without clusters up to this n")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    known = {}
    if options.output is not None and options.output.exists():
        rows = [json.loads(row) for row in options.output.read_text().splitlines()]
        known = {json.dumps(row["scenario"], sort_keys=True): row["found"] for row in rows}
    print("| documents | clusters | flips expected | imbalance | coverage % | power % | former % |")
    print("|---|---|---|---|---|---|---|")
    for scenario in scenarios():
        if options.most and scenario["n"] > options.most:
            continue
        key = json.dumps(scenario, sort_keys=True)
        if key not in known:
            has = "clusters" in scenario
            known[key] = clustered(scenario, options.repetitions) if has else alone(scenario)
            if options.output is not None:
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"scenario": scenario, "found": known[key]}) + "\n")
        print(line(scenario, known[key]), flush=True)


if __name__ == "__main__":
    main()
