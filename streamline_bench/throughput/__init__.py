"""Speed of models: tokens per second, latency and memory, each model in its own process.

The names below are imported on first use: a report that reads figures needs no engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamline_bench.throughput.load import ServingLoad, Slo
    from streamline_bench.throughput.measurement import measure
    from streamline_bench.throughput.record import ThroughputRecord, read_record, write_record
    from streamline_bench.throughput.serving import serve
    from streamline_bench.throughput.speed import ThroughputFigures, figures_of, read_figures
    from streamline_bench.throughput.workload import Setup, Workload

__all__ = [
    "ServingLoad", "Setup", "Slo", "ThroughputFigures", "ThroughputRecord", "Workload",
    "figures_of", "measure", "read_figures", "read_record", "serve", "write_record",
]  # fmt: skip

_WHERE = {
    "measure": "measurement",
    "serve": "serving",
    **dict.fromkeys(("ServingLoad", "Slo"), "load"),
    **dict.fromkeys(("ThroughputFigures", "figures_of", "read_figures"), "speed"),
    **dict.fromkeys(("Setup", "Workload"), "workload"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE.get(name, 'record')}"), name)
