"""Which machine this is, and how it was while models were measured on it."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from streamline_bench.core.machine.environment import package_versions
from streamline_bench.throughput.contender import Contender
from streamline_bench.throughput.meters import open_device, visible_device
from streamline_bench.throughput.record import Environment
from streamline_bench.throughput.workload import Setup

HOST_VARIABLE = "STREAMLINE_BENCH_MACHINE"
"""Replaces the host's name, which changes from run to run in containers."""


class Accelerator(NamedTuple):
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

    Speeds of different ids compare only as ratios within a run. The host's name (or
    ``STREAMLINE_BENCH_MACHINE``, if set) enters as a digest only.
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


class Surroundings:
    """The machine as it was when measuring began.

    Attributes:
        nvml: the accelerator's readings; None on a processor or without NVML.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._load = load_average()
        if setup.on_cpu:
            self.nvml, self._energy = None, "not read: processors report none here"
            self._memory = "resident memory of the process and its children, sampled"
        else:
            self.nvml, self._energy = open_device(visible_device(setup.device))
            self._memory = "NVML, or the peak of torch's allocator for engine hf"

    def described(self, contenders: Sequence[Contender]) -> Environment:
        """Return the record's environment, with the facts from the engines."""
        loaded = [c.loaded for c in contenders if c.loaded is not None]
        devices = accelerators()
        named = next((entry.device_name for entry in loaded if entry.device_name), None)
        versions = {key: value for entry in loaded for key, value in entry.versions.items()}
        return Environment(
            machine_id=machine_id(),
            device=self._setup.device,
            device_name=named or (processor_name() if self._setup.on_cpu else "unknown"),
            driver=devices[0].driver if devices and not self._setup.on_cpu else None,
            cpu_count=os.cpu_count() or 1,
            threads=self._setup.resolved_threads,
            engine_version=next((e.engine_version for e in loaded if e.engine_version), None),
            versions={**package_versions(), **versions},
            load_average=(self._load, load_average()),
            memory=self._memory,
            energy=self._energy,
        )
