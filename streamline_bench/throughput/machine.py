"""Which machine this is: names of processor and accelerators, and one id for equal machines."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Accelerator", "accelerators", "load_average", "machine_id", "processor_name"]

HOST_VARIABLE = "STREAMLINE_BENCH_MACHINE"
"""Stands for the host's name where that changes from run to run, as in containers."""


@dataclass(frozen=True)
class Accelerator:
    """An NVIDIA device as the driver names it."""

    name: str
    driver: str


def processor_name() -> str:
    """Return the processor's model, as the system names it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


@cache
def accelerators() -> tuple[Accelerator, ...]:
    """Return the NVIDIA devices of this machine, in the driver's order; none without a driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if done.returncode:
        return ()
    parts = (line.rpartition(",") for line in done.stdout.splitlines() if "," in line)
    return tuple(Accelerator(name.strip(), driver.strip()) for name, _, driver in parts)


def machine_id() -> str:
    """Return 16 hex digits, equal where processor, cores, accelerators and host are.

    Figures of different ids must not be compared but as ratios within a run. The host's name goes
    in as a digest only; ``STREAMLINE_BENCH_MACHINE`` stands for it where it is set.
    """
    parts = [
        processor_name(),
        str(os.cpu_count()),
        *(device.name for device in accelerators()),
        os.environ.get(HOST_VARIABLE) or platform.node(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def load_average() -> float | None:
    """Return the load average of the last minute, None where the system has none."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None
