"""Runs the benchmarks, checks them, and stores them beside earlier ones of the same machine.

    python tests/benchmarks/run_benchmarks.py --store .benchmarks [--output FILE] [pytest options]

The suite runs in ``--blocks`` processes, because a process keeps the speed that its start gave it.
Two things are checked, and nothing else: ratios within this run against :data:`LIMITS`, broken if
Student's interval over the blocks lies beyond the limit; and medians against what the last stored
runs of the same machine (``machine_id`` of the throughput package) predict, as ``gate --history``
does: slower by more than ``--tolerance``, and outside the prediction, fails. Absolute
times of other machines are never compared. A run that fails is not stored, so that the next one is
compared with the same figures again. ``--output`` gets pytest-benchmark's JSON, for
github-action-benchmark (tool ``pytest``), with the medians of all blocks in ``extra_info``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from streamline_bench.gate.speed_checks import FEWEST_RUNS, predicted
from streamline_bench.stability.statistics.score import holm
from streamline_bench.throughput.measurement import machine_id
from streamline_bench.throughput.results import student_interval

CONFIDENCE = 0.95


class Limit(NamedTuple):
    """The time of ``ours`` may be at most ``ratio`` times that of ``peer``, in one run."""

    ours: str
    peer: str
    ratio: float


LIMITS = {
    "scoring": Limit("streamline", "hf", 1.0),
    "scan": Limit("scan", "forward", 3.0),
    "search": Limit("shared", "naive", 0.85),
    "text": Limit("together", "apart", 0.6),
    "distillation": Limit("train", "forward", 6.0),
    "surgery": Limit("surgery", "copy", 3.0),
    "stability": Limit("vectorised", "loop", 0.2),
    "throughput": Limit("9", "12", 0.95),
}
"""Group -> ratio that no noise explains; what is usual is in the table of the run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True, help="folder of earlier runs")
    parser.add_argument("--output", type=Path, help="where to leave this run's JSON as well")
    parser.add_argument("--tolerance", type=float, default=0.1, help="relative, against the store")
    parser.add_argument("--blocks", type=int, default=3, help="processes that run the suite")
    parser.add_argument("--last", type=int, default=10, help="stored runs that count")
    options, rest = parser.parse_known_args()
    folder = options.store / machine_id()
    with tempfile.TemporaryDirectory() as work:
        files = [Path(work) / f"{block}.json" for block in range(options.blocks)]
        for each in files:
            code = run(each, rest)
            if code or not each.is_file() or not each.stat().st_size:
                return code or 1
        now = joined([json.loads(each.read_text()) for each in files])
        file = Path(work) / "benchmark.json"
        file.write_text(json.dumps(now))
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, options.output)
        before = last_stored(folder, options.last)
        faults = [*broken_limits(now), *slower_than(before, now, options.tolerance)]
        if not faults:
            store(file, folder)
    for fault in faults:
        print(f"FAILED {fault}")
    return 1 if faults else 0


def run(file: Path, rest: list[str]) -> int:
    """Run the suite; return pytest's exit code."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", str(here / "test_benchmarks.py"), "-p", "no:xdist"]
    command += ["--benchmark-only", f"--benchmark-json={file}", "--benchmark-group-by=group"]
    command += ["--benchmark-columns=min,median,iqr,rounds", *rest]
    return subprocess.run(command, check=False).returncode


def joined(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last block, with the medians of all of them."""
    medians: dict[str, list[float]] = {}
    for block in blocks:
        for benchmark in block["benchmarks"]:
            medians.setdefault(name_of(benchmark), []).append(benchmark["stats"]["median"])
    for benchmark in blocks[-1]["benchmarks"]:
        benchmark.setdefault("extra_info", {})["block_medians"] = medians[name_of(benchmark)]
    return blocks[-1]


def name_of(benchmark: Mapping[str, Any]) -> str:
    """Its name without the folder of the checkout."""
    return str(benchmark["fullname"]).rpartition("/")[2]


def logs_of(benchmark: Mapping[str, Any]) -> list[float]:
    """Logarithm of the median of each block; of runs before blocks, of the one."""
    found = benchmark.get("extra_info", {}).get("block_medians")
    return [math.log(median) for median in found or [benchmark["stats"]["median"]]]


def last_stored(folder: Path, last: int) -> list[dict[str, Any]]:
    """The newest runs of this machine, the oldest of them first."""
    files = sorted(folder.glob("*.json"))[-last:]
    print(f"Compared with {len(files)} earlier runs of this machine in {folder}.")
    return [json.loads(file.read_text()) for file in files]


def broken_limits(now: Mapping[str, Any]) -> list[str]:
    """Print every ratio within the run; return those that are above their limit beyond noise."""
    logs = {(b["group"], str(b["param"])): logs_of(b) for b in now["benchmarks"]}
    faults = []
    for group, limit in LIMITS.items():
        if (group, limit.ours) not in logs or (group, limit.peer) not in logs:
            continue  # -k chose others
        pairs = zip(logs[group, limit.ours], logs[group, limit.peer], strict=True)
        blocks = [np.array([ours - peer]) for ours, peer in pairs]
        ratio = math.exp(float(np.mean(blocks)))
        low, high = student_interval(blocks, CONFIDENCE)
        ends = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
        line = f"{group}: {limit.ours} / {limit.peer} = {ratio:.3f}{ends} (limit {limit.ratio})"
        print(line)
        if (ratio if low is None else low) > limit.ratio:
            faults.append(line)
    return faults


def slower_than(
    before: Sequence[Mapping[str, Any]], now: Mapping[str, Any], tolerance: float
) -> list[str]:
    """Steps slower than the stored runs predict, by more than ``tolerance``; Holm over them."""
    stored = [{name_of(b): float(np.mean(logs_of(b))) for b in run["benchmarks"]} for run in before]
    found = []
    for benchmark in now["benchmarks"]:
        name = name_of(benchmark)
        earlier = [math.exp(run[name]) for run in stored if name in run]
        if len(earlier) >= FEWEST_RUNS:
            change = predicted(math.exp(float(np.mean(logs_of(benchmark)))), earlier)
            found.append((name, change))
    adjusted = holm([change.p_value() or 0.0 for _, change in found], 1 - CONFIDENCE)
    return [
        f"{name}: {math.exp(change.log):.2f} times what earlier runs of this machine took"
        for (name, change), (p_value, _) in zip(found, adjusted, strict=True)
        if change.log > math.log1p(tolerance) and p_value < 1 - CONFIDENCE
    ]


def store(file: Path, folder: Path) -> None:
    """Keep the run under the next number; it appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    number = max((int(path.stem) for path in folder.glob("[0-9]*.json")), default=0) + 1
    target = folder / f"{number:04d}.json"
    hidden = folder / f".{number:04d}.{os.getpid()}"
    shutil.copyfile(file, hidden)
    hidden.replace(target)
    print(f"Stored as {target}.")


if __name__ == "__main__":
    sys.exit(main())
