"""Coverage and power of the paired test, with and without clusters: a Markdown table.

``python tests/benchmarks/coverage_of_intervals.py [--repetitions N] [--output FILE]``. ``--output``
keeps finished rows as JSON lines; a later run with the same file continues there.

Without clusters every outcome of n documents counts with its chance: coverage and power are exact.
With clusters they are simulated; seeds depend on the scenario only. The flips of a cluster are
multinomial with shares that vary by a Dirichlet distribution (intraclass correlation 0, 0.1, 0.3);
sizes are equal or log-normal. Both are computed for all draws at once, and the first draws of each
scenario are computed by the package too: any difference is an error.

Power is the chance to find a difference. "Former" is that of the procedure of version 0.1, which
needed two proofs. Documents: the exact conditional test (mid-p below 25 flips) and Newcombe's
interval. Clusters: the sign flip of clusters (every sign change up to 12 clusters, mid-p as for
documents, else its normal limit), the test of documents, and Student's interval.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, gammaln
from scipy.stats import norm
from scipy.stats import t as student

from streamline_bench.stability.statistics.paired import Outcomes, PairedSample
from streamline_bench.stability.statistics.score import PairedDifference

Scenario = dict[str, float]
Floats = npt.NDArray[np.float64]
CHECKED = 5  # draws per scenario that the package computes as well


def scenarios() -> Iterator[Scenario]:
    """``psi`` is the share of flips, ``slant`` its imbalance, ``together`` the correlation."""
    documents = (10, 30, 100, 300, 1000, 2000)
    for n in documents:
        for psi in (0.02, 0.1, 0.3, 0.6):
            for slant in (0.0, 0.5, 0.9):
                yield {"n": n, "psi": psi, "slant": slant}
    for n in documents:
        for clusters in (5, 20, 100):
            for uneven in (0.0, 1.0):
                for together in (0.0, 0.1, 0.3):
                    for psi, slant in ((0.02, 0.0), (0.1, 0.0), (0.1, 0.7), (0.3, 0.5)):
                        if n >= 2 * clusters:
                            yield {"n": n, "clusters": clusters, "uneven": uneven,
                                   "together": together, "psi": psi, "slant": slant}  # fmt: skip


def p_values(n: Floats, lost: Floats, gained: Floats, effect: Floats, freedom: Floats,
             difference: float) -> Floats:  # fmt: skip
    """Of the score test at this true difference, for every draw."""
    d = difference
    linear = (lost + gained) * (1 - d) + 2 * d * (gained - n)
    root = np.sqrt(np.maximum(0, linear**2 + 8 * n * lost * d * (1 - d)))
    share = np.maximum(np.maximum((linear + root) / (4 * n), 0), -d)
    error = np.sqrt(effect * np.maximum(0, 2 * share + d - d * d) / n)
    distance = np.abs((gained - lost) / n - d)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(distance < 1e-15, 0, distance / error)
    tail: Floats = np.where(np.isinf(freedom), norm.sf(scaled), student.sf(scaled, freedom))
    return 2 * tail


def wilson(share: Floats, n: Floats) -> tuple[Floats, Floats]:
    """Ends at 95 %."""
    z = norm.ppf(0.975)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def former_by_documents(n: Floats, b: Floats, c: Floats) -> npt.NDArray[np.bool_]:
    """What version 0.1 found without clusters, where half of the other answers were right."""
    flips, right = b + c, (n - b - c) // 2
    ways = gammaln(flips + 1) - gammaln(b + 1) - gammaln(c + 1) - flips * np.log(2)
    p = 2 * bdtr(np.minimum(b, c), np.maximum(flips, 1).astype(int), 0.5)
    p = np.where(b == c, 1.0, p - np.where(flips < 25, np.exp(ways), 0))
    wrong, dense, pruned = n - right - b - c, (right + b) / n, (right + c) / n
    margins = (right + b) * (c + wrong) * (right + c) * (b + wrong)
    product = right * wrong - b * c
    product = np.where(product > 0, np.maximum(0, product - n / 2), product)
    phi = np.where(margins > 0, product / np.sqrt(np.maximum(margins, 1)), 0)
    (low1, high1), (low2, high2) = wilson(pruned, n), wilson(dense, n)
    x = np.where(c > b, pruned - low1, high1 - pruned)
    y = np.where(c > b, high2 - dense, dense - low2)
    half = np.sqrt(np.maximum(0, x * x - 2 * phi * x * y + y * y))
    found: npt.NDArray[np.bool_] = (p < 0.05) & (np.abs(pruned - dense) > half)
    return found


def former_by_clusters(sizes: Floats, b: Floats, c: Floats) -> npt.NDArray[np.bool_]:
    """What version 0.1 found with clusters, [draws, clusters] each."""
    net, count = c - b, sizes.shape[1]
    seen = np.abs(net.sum(axis=1))
    if count <= 12:
        signs = np.array(np.meshgrid(*[[-1, 1]] * count)).reshape(count, -1)
        totals = np.abs(net @ signs)
        same = np.abs(totals - seen[:, None]) < 0.5
        p = (totals > seen[:, None] + 0.5).mean(axis=1) + same.mean(axis=1) / 2
        p = np.where(seen == 0, 1.0, p)
    else:
        p = 2 * norm.sf(seen / np.sqrt(np.maximum(np.square(net).sum(axis=1), 1e-9)))
    n = sizes.sum(axis=1)
    residual = net - net.sum(axis=1, keepdims=True) / n[:, None] * sizes
    error = np.sqrt(count / (count - 1) * np.square(residual).sum(axis=1))
    quantile = student.ppf(0.975, count - 1) if count < 20 else norm.ppf(0.975)
    alone = former_by_documents(n, b.sum(axis=1), c.sum(axis=1))
    found: npt.NDArray[np.bool_] = (p < 0.05) & (seen > quantile * error) & alone
    return found


def alone(scenario: Scenario) -> dict[str, float]:
    """Exact coverage and power, without clusters: every outcome within eight deviations."""
    n, lost, gained = int(scenario["n"]), *shares(scenario)
    near = []
    for p in (lost, gained):
        half = 8 * (n * p) ** 0.5 + 5
        near.append(np.arange(max(0, int(n * p - half)), min(n, int(n * p + half)) + 1))
    b, c = (axis.ravel().astype(float) for axis in np.meshgrid(*near, indexing="ij"))
    b, c = b[b + c <= n], c[b + c <= n]
    ways = gammaln(n + 1) - gammaln(b + 1) - gammaln(c + 1) - gammaln(n - b - c + 1)
    chance = np.exp(ways + b * np.log(lost) + c * np.log(gained)
                    + (n - b - c) * np.log1p(-lost - gained))  # fmt: skip
    plain = np.full(len(b), float(n)), b, c, np.ones(len(b)), np.full(len(b), np.inf)
    truth = gained - lost
    at_truth, at_zero = p_values(*plain, truth), p_values(*plain, 0.0)
    for i in np.argsort(-chance)[:CHECKED]:
        check(PairedSample(Outcomes(int(n - b[i] - c[i]), int(b[i]), int(c[i]), 0)),
              {truth: at_truth[i], 0.0: at_zero[i]})  # fmt: skip
    return {
        "coverage": float(chance @ (at_truth >= 0.05)),
        "power": float(chance @ (at_zero < 0.05)),
        "former_power": float(chance @ former_by_documents(plain[0], b, c)),
    }


def clustered(scenario: Scenario, draws: int) -> dict[str, float]:
    """Simulated coverage and power, with clusters."""
    source = np.random.default_rng(zlib.crc32(json.dumps(scenario, sort_keys=True).encode()))
    count, together, (lost, gained) = (
        int(scenario["clusters"]),
        scenario["together"],
        shares(scenario),
    )
    sizes = source.lognormal(0.0, scenario["uneven"], size=(draws, count))
    sizes *= scenario["n"] / sizes.sum(axis=1, keepdims=True)
    sizes = np.maximum(1, np.rint(sizes)).astype(int)
    parts = np.broadcast_to([lost, gained, 1 - lost - gained], (draws, count, 3))
    if together:
        parts = source.gamma(parts * (1 - together) / together) + 1e-300
        parts = parts / parts.sum(axis=2, keepdims=True)
    drawn = source.multinomial(sizes, parts).astype(float)
    b, c, same = np.moveaxis(drawn, 2, 0)
    n, share = sizes.sum(axis=1).astype(float), sizes / sizes.sum(axis=1, keepdims=True)
    change = (c - b).sum(axis=1)
    alone_ = (b + c).sum(axis=1) - change**2 / n
    robust = ((c - b - share * change[:, None]) ** 2 / (1 - share)).sum(axis=1)
    pairs = share**2 / (1 - share)
    freedom = 1 / ((share**2).sum(axis=1) + pairs.sum(axis=1) ** 2 - (pairs**2).sum(axis=1))
    robust += 0.5
    found = n, b.sum(axis=1), c.sum(axis=1), robust / (alone_ + 0.5), freedom
    truth = gained - lost
    at_truth, at_zero = p_values(*found, truth), p_values(*found, 0.0)
    for i in range(CHECKED):
        table = np.stack([sizes[i], same[i] + b[i], same[i] + c[i], same[i]], axis=1)
        outcomes = Outcomes(int(same[i].sum()), int(b[i].sum()), int(c[i].sum()), 0)
        check(PairedSample(outcomes, (table,), "clusters"), {truth: at_truth[i], 0.0: at_zero[i]})
    return {
        "coverage": float((at_truth >= 0.05).mean()),
        "power": float((at_zero < 0.05).mean()),
        "former_power": float(former_by_clusters(sizes.astype(float), b, c).mean()),
    }


def shares(scenario: Scenario) -> tuple[float, float]:
    """Lost and gained."""
    psi, slant = scenario["psi"], scenario["slant"]
    return psi * (1 + slant) / 2, psi * (1 - slant) / 2


def check(sample: PairedSample, expected: dict[float, float]) -> None:
    """Compare p-values with the package's."""
    for difference, p in expected.items():
        ours = PairedDifference((sample,)).p_value(difference)
        if not np.isclose(ours, p, rtol=1e-6, atol=1e-9):
            raise SystemExit(f"{sample} at {difference}: p is {ours} in the package, {p} here.")


def line(scenario: Scenario, found: dict[str, float]) -> str:
    """One row of the table."""
    sizes = ("-" if "clusters" not in scenario
             else f"{scenario['clusters']:g} {'unequal' if scenario['uneven'] else 'equal'}, "
             f"correlation {scenario['together']:g}")  # fmt: skip
    shown = (f"{100 * found[name]:.1f}" for name in ("coverage", "power", "former_power"))
    flips = scenario["n"] * scenario["psi"]
    return (
        f"| {scenario['n']:g} | {sizes} | {flips:g} | {scenario['slant']:g} | {' | '.join(shown)} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repetitions", type=int, default=4000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    known = {}
    if options.output is not None and options.output.exists():
        rows = [json.loads(row) for row in options.output.read_text().splitlines()]
        known = {json.dumps(row["scenario"], sort_keys=True): row["found"] for row in rows}
    print("| documents | clusters | flips expected | imbalance | coverage % | power % | former % |")
    print("|---|---|---|---|---|---|---|")
    for scenario in scenarios():
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
