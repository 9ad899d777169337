"""Where a measurement runs: noted before it starts, written down when it is over."""

from __future__ import annotations

import os
from collections.abc import Sequence

from streamline_bench.core.machine.versions import package_versions
from streamline_bench.throughput.contender import Contender
from streamline_bench.throughput.machine import (
    accelerators,
    load_average,
    machine_id,
    processor_name,
)
from streamline_bench.throughput.nvml import open_device, visible_device
from streamline_bench.throughput.record import Environment
from streamline_bench.throughput.setup import Setup

__all__ = ["Surroundings"]


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
        """Return the record's environment, with what the engines said."""
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
