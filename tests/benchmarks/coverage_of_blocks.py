"""Coverage of intervals of a speed ratio when the speed of a process is drawn at its start.

``python tests/benchmarks/coverage_of_blocks.py [--repetitions N]`` prints three Markdown tables.
Model and dense have the same true speed; every process has an error of its own, every round
another one (2 %). First: a fixed number of blocks, with Student's interval over blocks (the one of
the record), the hierarchical bootstrap of the median (shown with it), and a bootstrap that takes
all rounds as units. Second: blocks are added until half the width is below 2 % so many times in a
row. Third: percentiles of served requests, between order statistics. Latencies are log-normal, a
start shifts all of its own, and a request that waits for the one before it resembles it. The
percentile is that over all starts; the interval knows the blocks, as that of the record does.
"""

from __future__ import annotations

import argparse
import math
import zlib

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtrit

from streamline_bench.throughput.blocks import IN_A_ROW
from streamline_bench.throughput.percentiles import percentile
from streamline_bench.throughput.results import bootstrap_interval, student_interval
from streamline_bench.throughput.workload import MOST_BLOCKS

Floats = npt.NDArray[np.float64]
ROUNDS, ROUND_ERROR, CONFIDENCE, PRECISION = 6, 0.02, 0.95, 0.02
LATENCY_SPREAD = 0.5
"""Standard deviation of the logarithm of the latencies of one server."""


PERCENTILES = ((3, 32, 0.5), (3, 32, 0.9), (5, 100, 0.95), (5, 200, 0.99))
"""Blocks, counted requests of each, and the percentile."""


def ratios(generator: np.random.Generator, blocks: int, process: float) -> Floats:
    """Logarithms of model / dense [blocks, rounds]; the true one is 0."""
    one, other = (
        generator.normal(0, process, (blocks, 1))
        + generator.normal(0, ROUND_ERROR, (blocks, ROUNDS))
        for _ in range(2)
    )
    return one - other


def covers(interval: tuple[float | None, float | None]) -> bool:
    """Whether 1 is inside."""
    low, high = interval
    return low is not None and high is not None and low <= 1 <= high


def of_fixed_blocks(blocks: int, process: float, repetitions: int) -> tuple[float, ...]:
    """Coverage of Student's interval, of both bootstraps (a tenth of the runs), and half width."""
    generator = np.random.default_rng(zlib.crc32(f"{blocks} {process}".encode()))
    hits, widths, few = np.zeros(3), [], max(1, repetitions // 10)
    for repetition in range(repetitions):
        logs = ratios(generator, blocks, process)
        low, high = student_interval([*logs], CONFIDENCE)
        hits[0] += covers((low, high))
        widths.append(((high or 0) - (low or 0)) / 2)
        if repetition < few:
            hits[1] += covers(bootstrap_interval([*logs], CONFIDENCE, generator, draws=1000))
            drawn = np.median(generator.choice(logs.ravel(), (1000, logs.size)), axis=1)
            hits[2] += covers(tuple(np.exp(np.quantile(drawn, [0.025, 0.975]))))  # type: ignore[arg-type]
    return hits[0] / repetitions, hits[1] / few, hits[2] / few, float(np.median(widths))


def of_a_precision(in_a_row: int, process: float, repetitions: int) -> tuple[float, float]:
    """Coverage of Student's interval at the end, and the mean number of blocks."""
    generator = np.random.default_rng(zlib.crc32(f"{in_a_row} {process}".encode()))
    error = math.sqrt(2) * math.hypot(process, ROUND_ERROR / math.sqrt(ROUNDS))
    logs = generator.normal(0, error, (repetitions, MOST_BLOCKS))
    count = np.arange(2, MOST_BLOCKS + 1)
    mean = (logs.cumsum(axis=1) / np.arange(1, MOST_BLOCKS + 1))[:, 1:]
    spread = np.sqrt(((logs**2).cumsum(axis=1)[:, 1:] - count * mean**2) / (count - 1))
    half = stdtrit(count - 1, 0.5 + CONFIDENCE / 2) * spread / np.sqrt(count)
    precise = half < PRECISION
    enough = precise.copy()
    for back in range(1, in_a_row):
        enough[:, back:] &= precise[:, :-back]
        enough[:, :back] = False
    enough[:, 0] = False  # 3 blocks at least
    enough[:, -1] = True
    last = enough.argmax(axis=1)
    runs = np.arange(repetitions)
    return float((abs(mean[runs, last]) <= half[runs, last]).mean()), float(count[last].mean())


def of_a_percentile(
    share: float, blocks: int, requests: int, process: float, alike: float, repetitions: int
) -> tuple[float, float, float]:
    """Coverage of a percentile's interval, with blocks and without, and how often there is one.

    Args:
        requests: of each block.
        alike: correlation of the latency of a request with that of the one before it.
    """
    generator = np.random.default_rng(zlib.crc32(f"{share} {blocks} {process} {alike}".encode()))
    truth = float(ndtri(share)) * math.hypot(LATENCY_SPREAD, process)
    starts = np.repeat(np.arange(blocks), requests)
    hits, known = np.zeros(2), 0
    for _ in range(repetitions):
        logs = latencies(generator, blocks, requests, process, alike)
        grouped, single = (
            percentile(np.exp(logs.ravel()), share, CONFIDENCE, *groups)
            for groups in ((starts,), ())
        )
        known += grouped is not None and grouped.low is not None
        for place, found in enumerate((grouped, single)):
            low, high = (None, None) if found is None else (found.low, found.high)
            hits[place] += low is not None and high is not None and low <= math.exp(truth) <= high
    return hits[0] / max(known, 1), hits[1] / repetitions, known / repetitions


def latencies(
    generator: np.random.Generator, blocks: int, requests: int, process: float, alike: float
) -> Floats:
    """Logarithms of latencies [blocks, requests], by start and in the order of the requests."""
    fresh = generator.normal(0, 1, (blocks, requests))
    fresh[:, 1:] *= math.sqrt(1 - alike**2)
    for place in range(1, requests):
        fresh[:, place] += alike * fresh[:, place - 1]
    return LATENCY_SPREAD * fresh + generator.normal(0, process, (blocks, 1))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=20_000)
    repetitions = parser.parse_args().repetitions
    _print("processes %", "blocks", "Student", "hierarchical bootstrap", "rounds as units", "±")
    for process in (0.03, 0.05, 0.08):
        for blocks in (3, 5, 8):
            shares = of_fixed_blocks(blocks, process, repetitions)
            _print(f"{100 * process:g}", blocks, *(f"{100 * share:.1f}" for share in shares))
    _print("processes %", "precise so often in a row", "coverage", "mean blocks")
    for process in (0.005, 0.01, 0.02, 0.03):
        for in_a_row in (1, 2, IN_A_ROW):
            share, count = of_a_precision(in_a_row, process, repetitions)
            _print(f"{100 * process:g}", in_a_row, f"{100 * share:.1f}", f"{count:.1f}")
    _print("processes %", "blocks x requests", "percentile", "alike", "coverage",
           "without blocks", "has an interval, %")  # fmt: skip
    for process in (0.0, 0.03, 0.08):
        for blocks, requests, share in PERCENTILES:
            for alike in (0.0, 0.5):
                how = (share, blocks, requests, process, alike)
                shares = of_a_percentile(*how, max(1, repetitions // 10))
                size, name = f"{blocks} x {requests}", f"p{100 * share:g}"
                _print(f"{100 * process:g}", size, name, alike,
                       *(f"{100 * each:.1f}" for each in shares))  # fmt: skip


def _print(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if str(cells[0]).startswith("processes"):
        print(f"|{' ---: |' * len(cells)}", flush=True)


if __name__ == "__main__":
    main()
