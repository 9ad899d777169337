"""Speed of models: tokens per second, latency and memory, each model in a process of its own."""

from __future__ import annotations

from streamline_bench.throughput.measurement import measure
from streamline_bench.throughput.record import ThroughputRecord, read_record, write_record
from streamline_bench.throughput.serving_measurement import serve
from streamline_bench.throughput.speed import ThroughputFigures, figures_of, read_figures
from streamline_bench.throughput.workload import ServingLoad, Setup, Workload

__all__ = [
    "ServingLoad",
    "Setup",
    "ThroughputFigures",
    "ThroughputRecord",
    "Workload",
    "figures_of",
    "measure",
    "read_figures",
    "read_record",
    "serve",
    "write_record",
]
