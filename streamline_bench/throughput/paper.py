"""The figures of the paper's speed table, and the way of measuring that comes closest to it.

Quoted for Llama-2-7B at about 25 % sparsity (LLM-Streamline, arXiv 2403.19135): output tokens per
second. Engine, device and lengths were not given with them; 19.87 tokens/s for a dense 7 B model
looks like transformers without compilation, one sequence at a time, so that is what paper mode
runs. Only the ratios to dense can be set beside figures from another machine.
"""

from __future__ import annotations

from streamline_bench.throughput.record import PaperFigure
from streamline_bench.throughput.workload import Workload

__all__ = ["ATTENTION", "PAPER_FIGURES", "paper_workload"]

_DENSE = 19.87
_ROWS = (
    ("dense", _DENSE),
    ("LLM-Streamline, no replacement or a layer", 25.68),
    ("LLM-Streamline, FFN", 25.88),
    ("SliceGPT", 27.20),
    ("LLM-Pruner", 25.91),
)

PAPER_FIGURES = tuple(
    PaperFigure(name=name, tokens_per_second=speed, ratio=speed / _DENSE) for name, speed in _ROWS
)

ATTENTION = "eager"
"""transformers' own attention of that time."""


def paper_workload(workload: Workload) -> Workload:
    """Return the workload with one sequence at a time."""
    return workload.model_copy(update={"batch_sizes": (1,)})
