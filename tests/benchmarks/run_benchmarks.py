"""Runs the benchmarks, checks them, and stores them beside earlier ones of the same machine.

    python tests/benchmarks/run_benchmarks.py --store .benchmarks [--output FILE] [pytest options]

Two things are checked, and nothing else: ratios within this run against :data:`LIMITS`, and medians
against the last stored run of the same machine (``machine_id`` of the throughput package), if one
is there: slower by more than ``--tolerance``, with the quartiles apart, fails. Absolute times of
other machines are never compared. A run that fails is not stored, so that the next one is compared
with the same figures again. ``--output`` gets pytest-benchmark's JSON, for
github-action-benchmark (tool ``pytest``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from streamline_bench.throughput.measurement import machine_id


class Limit(NamedTuple):
    """The median of ``ours`` may be at most ``ratio`` times that of ``peer``, in one run."""

    ours: str
    peer: str
    ratio: float


LIMITS = {
    "scoring": Limit("streamline", "hf", 1.0),
    "scan": Limit("scan", "forward", 3.0),
    "search": Limit("shared", "naive", 0.85),
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
    parser.add_argument("--tolerance", type=float, default=0.3, help="relative, against the store")
    options, rest = parser.parse_known_args()
    folder = options.store / machine_id()
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "benchmark.json"
        code = run(file, rest)
        if code or not file.is_file() or not file.stat().st_size:
            return code or 1
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, options.output)
        now = json.loads(file.read_text())
        before = last_stored(folder)
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


def last_stored(folder: Path) -> dict[str, Any] | None:
    """The newest run of this machine."""
    files = sorted(folder.glob("*.json"))
    if not files:
        print(f"No earlier run of this machine in {folder}: nothing to compare with.")
        return None
    print(f"Compared with {files[-1]}.")
    stored: dict[str, Any] = json.loads(files[-1].read_text())
    return stored


def broken_limits(now: Mapping[str, Any]) -> list[str]:
    """Print every ratio within the run; return those above their limit."""
    medians = {(b["group"], str(b["param"])): b["stats"]["median"] for b in now["benchmarks"]}
    faults = []
    for group, limit in LIMITS.items():
        if (group, limit.ours) not in medians or (group, limit.peer) not in medians:
            continue  # -k chose others
        ratio = medians[group, limit.ours] / medians[group, limit.peer]
        line = f"{group}: {limit.ours} / {limit.peer} = {ratio:.3f} (limit {limit.ratio})"
        print(line)
        if ratio > limit.ratio:
            faults.append(line)
    return faults


def slower_than(
    before: Mapping[str, Any] | None, now: Mapping[str, Any], tolerance: float
) -> list[str]:
    """Steps slower than the stored ones by more than ``tolerance``, with the quartiles apart."""
    if before is None:
        return []
    old = {b["fullname"].rpartition("/")[2]: b["stats"] for b in before["benchmarks"]}
    faults = []
    for benchmark in now["benchmarks"]:
        name, new = benchmark["fullname"].rpartition("/")[2], benchmark["stats"]
        if name not in old:
            continue
        ratio = new["median"] / old[name]["median"]
        if ratio > 1 + tolerance and new["q1"] > old[name]["q3"]:
            faults.append(f"{name}: {ratio:.2f} times the stored median on this machine")
    return faults


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
