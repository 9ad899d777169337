"""Time and memory of the importance scan beside plain forward passes over the same tokens.

    python tests/benchmarks/scan_vs_forward.py [--layers 12 --hidden 256 ...]

One thread; the three are timed in turn, in processor time, and the medians of their ratios within
each turn are printed. Peak memory is taken in fresh processes, for two numbers of samples.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from llama_and_tokens import llama_and_tokens

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.scan import scan


def moved(options: argparse.Namespace, samples: int) -> tuple[Any, CalibrationTokens]:
    model, tokens = llama_and_tokens(options, samples)
    return model.to(options.device, getattr(torch, options.dtype)), tokens


def forward(module: Any, tokens: CalibrationTokens, batch_size: int) -> None:
    device = next(module.parameters()).device
    with torch.no_grad():
        for ids, _ in tokens.batches(batch_size):
            module(input_ids=ids.to(device), use_cache=False)


def seconds(work: Callable[[], Any], device: str) -> float:
    """Processor time on the CPU; on an accelerator wall time to the end of all its work."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def peak_mebibytes(arguments: list[str], samples: int) -> float:
    command = [sys.executable, __file__, *arguments, "--only-peak", str(samples)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in [
        ("layers", 12), ("hidden", 256), ("vocabulary", 8192), ("length", 512),
        ("samples", 4), ("batch-size", 1), ("repeats", 9),
    ]:  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only-peak", type=int, metavar="SAMPLES", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only_peak:
        model, tokens = moved(options, options.only_peak)
        scan(model, tokens, batch_size=options.batch_size, progress=False)
        if options.device == "cpu":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        else:
            print(torch.cuda.max_memory_allocated() / 2**20)
        return

    model, tokens = moved(options, options.samples)
    runs: dict[str, Callable[[], Any]] = {
        "base": lambda: forward(model.model, tokens, options.batch_size),
        "full": lambda: forward(model, tokens, options.batch_size),
        "scan": lambda: scan(model, tokens, batch_size=options.batch_size, progress=False),
    }
    for run in runs.values():
        run()
    turns = [
        {name: seconds(run, options.device) for name, run in runs.items()}
        for _ in range(options.repeats)
    ]
    count = tokens.num_tokens
    for name in runs:
        middle = statistics.median(turn[name] for turn in turns)
        print(f"{name}: {middle:.3f} s, {count / middle:,.0f} tokens/s")
    for peer, what in [("base", "forward without LM head"), ("full", "forward with LM head")]:
        ratios = sorted(turn["scan"] / turn[peer] for turn in turns)
        print(
            f"scan / {what}: {statistics.median(ratios):.3f} "
            f"(range {ratios[0]:.3f} to {ratios[-1]:.3f}, {len(turns)} turns)"
        )
    few, many = options.samples, options.samples * 8
    peaks = [peak_mebibytes(sys.argv[1:], samples) for samples in (few, many)]
    print(f"peak memory: {peaks[0]:.0f} MiB with {few} samples, {peaks[1]:.0f} MiB with {many}")


if __name__ == "__main__":
    main()
