"""Coverage of the interval over questions, seeds and calibrations: a Markdown table.

``python tests/benchmarks/coverage_of_seeds.py [--repetitions N]``. Scores have known variances: of
questions, seeds, calibrations, of seed and calibration together, and of each with the question.
``normal`` scores are their sum; ``right or wrong`` ones are 1 where it exceeds a threshold, their
true mean is known in closed form. ``ratio`` is the standard deviation between seeds (and
between calibrations) over the standard error that questions alone give: at 0 the method always
gives the same, at 5 it decides nearly everything.
"""

from __future__ import annotations

import argparse
import math
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from streamline_bench.stability.statistics.crossed import CrossedTask, crossed_estimate

Scores = npt.NDArray[np.float64]
QUESTION, WITH_QUESTION = 0.41, 0.22
"""Standard deviations between questions, and of what a run adds to a question."""


def scenarios() -> Iterator[tuple[str, int, int, int, float]]:
    """Kind of score, seeds, calibrations, questions, ratio."""
    for kind in ("normal", "right or wrong"):
        for seeds, calibrations in ((2, 1), (3, 1), (5, 1), (2, 2), (3, 2), (3, 3)):
            for ratio in (0.0, 0.5, 1.0, 2.0, 5.0):
                yield kind, seeds, calibrations, 200, ratio


def scores(
    generator: np.random.Generator, seeds: int, calibrations: int, n: int, ratio: float
) -> tuple[Scores, float]:
    """Scores [seeds, calibrations, n] around 0, and the standard deviation of one of them."""
    spread = ratio * QUESTION / math.sqrt(n)
    effects = [((1, 1, n), QUESTION), ((seeds, 1, 1), spread)]
    if calibrations > 1:
        effects += [((1, calibrations, 1), spread), ((seeds, calibrations, 1), 0.3 * spread)]
    made = sum(generator.normal(0, size, shape) for shape, size in effects)
    for shape in ((seeds, 1, n), (1, calibrations, n), (seeds, calibrations, n)):
        made = made + generator.normal(0, WITH_QUESTION / math.sqrt(3), shape)
    variance = sum(size**2 for _, size in effects) + WITH_QUESTION**2
    return made, math.sqrt(variance)


def coverage(
    kind: str, seeds: int, calibrations: int, n: int, ratio: float, repetitions: int
) -> tuple[float, float]:
    """Share of the intervals that hold the true mean, and their median width."""
    name = f"{kind} {seeds} {calibrations} {n} {ratio}"
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    threshold, hits, widths = -0.3, 0, []
    for _ in range(repetitions):
        made, deviation = scores(generator, seeds, calibrations, n, ratio)
        truth = 0.0
        if kind != "normal":
            made = (made > threshold).astype(np.float64)
            truth = float(norm.sf(threshold / deviation))
        found, _ = crossed_estimate([CrossedTask(made)])
        assert found.low is not None and found.high is not None
        hits += found.low <= truth <= found.high
        widths.append(found.high - found.low)
    return hits / repetitions, float(np.median(widths))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=2000)
    repetitions = parser.parse_args().repetitions
    print("| scores | seeds | calibrations | questions | ratio | coverage % | median width |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for scenario in scenarios():
        share, width = coverage(*scenario, repetitions)
        cells = [*map(str, scenario), f"{100 * share:.1f}", f"{width:.3f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
