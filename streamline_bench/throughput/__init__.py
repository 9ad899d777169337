"""Speed of models: tokens per second, latency and memory, each model in its own process.

The names below are imported on first use: a report that reads figures needs no engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_WHERE = {
    "measure": "measurement",
    "serve": "serving_measurement",
    **dict.fromkeys(("ThroughputRecord", "read_record", "write_record"), "record"),
    **dict.fromkeys(("ThroughputFigures", "figures_of", "read_figures"), "speed"),
    **dict.fromkeys(("ServingLoad", "Setup", "Workload"), "workload"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
