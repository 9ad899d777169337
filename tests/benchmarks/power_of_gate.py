"""Power and false alarms of the gate on speed, by simulation.

``python tests/benchmarks/power_of_gate.py [--repetitions N] [--output FILE]`` prints two Markdown
tables. With ``--output``, what was simulated is kept there, and the same command continues.

Every start of a process has a speed of its own (``process``), every run of the CI the machine's of
that day, which wanders (``DRIFT`` from run to run) and scatters (``DAY``). There are a dense and
two pruned models; the second pruned one may be slower by the ``loss``. Three gates look at it:

- ``base``: base and head in one measurement, alternating in blocks; no day matters.
- ``reference``: against one earlier run: ratios to dense, and tokens per second.
- ``history``: against the last 10 runs, likewise.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from streamline_bench.gate.evidence import Reference, RowReference
from streamline_bench.gate.result import Check, Thresholds
from streamline_bench.gate.speed_checks import (
    against_base,
    against_history,
    against_reference,
    speed_checks,
)
from streamline_bench.throughput.speed import Speed

Floats = npt.NDArray[np.float64]
DRIFT, DAY, LAST = 0.01, 0.01, 10
MODELS = {"dense": 100.0, "one": 130.0, "two": 130.0}


def measured(
    generator: np.random.Generator, blocks: int, process: float, day: float, loss: float
) -> tuple[RowReference, ...]:
    """One run: the speed of every model, and its ratio to dense in the same blocks."""
    logs = {
        label: math.log(rate) + day + generator.normal(0, process, blocks)
        for label, rate in MODELS.items()
    }
    logs["two"] += math.log1p(-loss)
    return tuple(
        RowReference(
            label=label, is_dense=label == "dense", speed=speed_of(own, own - logs["dense"])
        )
        for label, own in logs.items()
    )


def speed_of(own: Floats, ratio: Floats | None) -> Speed:
    """What is in a record: logarithms of the speed, and of the ratio, of every block."""
    paired = ratio is not None and bool(ratio.any())
    return Speed(
        status="ok", engine="vllm", device="a", dtype="bfloat16", batch_size=8, blocks=len(own),
        output_tokens_per_second=math.exp(own.mean()), error=error_of(own),
        ratio=math.exp(ratio.mean()) if ratio is not None and paired else None,
        ratio_error=error_of(ratio) if ratio is not None and paired else None,
    )  # fmt: skip


def error_of(logs: Floats) -> float:
    """Standard error over blocks."""
    return float(logs.std(ddof=1)) / math.sqrt(len(logs))


def run_of(rows: tuple[RowReference, ...]) -> Reference:
    """The rows as a run of one machine."""
    return Reference(source="run", title="run", dense="dense", rows=rows, machine="m")


def alarms(checks: list[Check]) -> bool:
    """Whether the gate is closed."""
    return any(check.status == "regressed" for check in checks)


def of_base(
    generator: np.random.Generator, blocks: int, process: float, loss: float, allowed: Thresholds
) -> bool:
    """Head ("two") against base, which has the same true speed as head had."""
    base, head = generator.normal(0, process, (2, blocks))
    speed = speed_of(head, head + math.log1p(-loss) - base)
    rows = [RowReference(label="head", is_dense=False, speed=speed)]
    return alarms(speed_checks([*against_base(rows, "base")], allowed))


def days(generator: np.random.Generator, count: int) -> Floats:
    """The machine's speed on every day, as a logarithm."""
    return generator.normal(0, DRIFT, count).cumsum() + generator.normal(0, DAY, count)


def of_reference(
    generator: np.random.Generator, blocks: int, process: float, loss: float, allowed: Thresholds
) -> bool:
    """A run against the one of 10 days ago."""
    first, *_, last = days(generator, LAST + 1)
    before = measured(generator, blocks, process, first, 0)
    now = measured(generator, blocks, process, last, loss)
    pairs = list(zip(now, before, strict=True))
    return alarms(speed_checks([*against_reference(run_of(now), run_of(before), pairs)], allowed))


def of_history(
    generator: np.random.Generator, blocks: int, process: float, loss: float, allowed: Thresholds
) -> bool:
    """A run against the 10 before it."""
    *earlier, last = days(generator, LAST + 1)
    history = [speeds(measured(generator, blocks, process, day, 0)) for day in earlier]
    now = measured(generator, blocks, process, last, loss)
    return alarms(speed_checks([*against_history(now, history)], allowed))


def speeds(rows: tuple[RowReference, ...]) -> dict[str, Speed]:
    """Label -> speed."""
    return {row.label: row.speed for row in rows if row.speed is not None}


GATES: dict[str, Callable[..., bool]] = {
    "base": of_base,
    "reference": of_reference,
    "history": of_history,
}


def share_of_alarms(
    gate: str, blocks: int, process: float, loss: float, tolerance: float, repetitions: int
) -> float:
    """How often a gate closes."""
    seed = zlib.crc32(f"{gate} {blocks} {process} {loss} {tolerance}".encode())
    generator, allowed = np.random.default_rng(seed), Thresholds(speed=tolerance)
    closed = [GATES[gate](generator, blocks, process, loss, allowed) for _ in range(repetitions)]
    return sum(closed) / repetitions


def ci_year(blocks: int, process: float, tolerance: float, seed: int, runs: int = 200) -> float:
    """Share of ``runs`` CI runs without any loss that a gate with a growing history closes.

    A run that fails is not kept, so that the history may stay behind a machine that wanders off.
    """
    generator, allowed = np.random.default_rng(seed), Thresholds(speed=tolerance)
    history: list[dict[str, Speed]] = []
    closed = 0
    for day in days(generator, runs):
        now = measured(generator, blocks, process, day, 0)
        if alarms(speed_checks([*against_history(now, history[-LAST:])], allowed)):
            closed += 1
        else:
            history.append(speeds(now))
    return closed / runs


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--output", type=Path, help="where to keep what was simulated")
    options = parser.parse_args()
    kept = (
        json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    )

    def cell(name: str, make: Callable[[], float]) -> float:
        name = f"{name} x {options.repetitions}"
        if name not in kept:
            kept[name] = make()
            if options.output:
                options.output.write_text(json.dumps(kept, indent=1))
        return float(kept[name])

    print("| gate | blocks | process % | tolerated % | no loss | 3 % lost | 5 % lost |")
    print("| --- |" + " ---: |" * 6)
    for gate in GATES:
        for blocks in (3, 5, 10):
            for process in (0.01, 0.03):
                for tolerance in (0.0, 0.02):
                    how = (gate, blocks, process)
                    shares = [
                        cell(
                            f"{how} {loss} {tolerance}",
                            lambda how=how, loss=loss, tolerance=tolerance: share_of_alarms(  # type: ignore[misc]
                                *how, loss, tolerance, options.repetitions
                            ),
                        )
                        for loss in (0.0, 0.03, 0.05)
                    ]
                    found = " | ".join(f"{100 * share:.1f}" for share in shares)
                    print(
                        f"| {gate} | {blocks} | {100 * process:g} | {100 * tolerance:g} | {found} |"
                    )
    print("\n| blocks | process % | tolerated % | alarms in 200 runs with drift, % |")
    print("|" + " ---: |" * 4)
    for blocks, process in ((3, 0.01), (3, 0.03), (5, 0.03)):
        for tolerance in (0.0, 0.02, 0.05):
            years = [
                cell(
                    f"year {blocks} {process} {tolerance} {seed}",
                    lambda seed=seed, how=(blocks, process, tolerance): ci_year(*how, seed),  # type: ignore[misc]
                )
                for seed in range(max(1, options.repetitions // 40))
            ]
            worst = f"{100 * np.mean(years):.1f} (worst of {len(years)}: {100 * max(years):.1f})"
            print(f"| {blocks} | {100 * process:g} | {100 * tolerance:g} | {worst} |")


if __name__ == "__main__":
    main()
