"""The demo: a comparison of a few recipes on the bundled model, in the run folder of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streamline_bench.demo.preset import bundled_request
from streamline_bench.resources import BUNDLED
from streamline_bench.runs.planning.request import make_request
from streamline_bench.runs.run import CompareResult, compare_request

DEMO_ROWS: tuple[str, ...] = ("dense", "streamline_none", "streamline", "streamline_ffn_res")


@dataclass(frozen=True)
class DemoOptions:
    """What ``streamline-bench demo`` takes.

    Attributes:
        output: run folder.
        rows: recipe names; the others are compared with the dense one.
        sparsity: share of the parameters to remove.
        limit: documents per task, ``None`` for all.
        until: last stage to run.
        batch_size: what the harness is given.
        overwrite: what an earlier demo made in ``output`` is removed first.
    """

    output: Path
    rows: tuple[str, ...] = DEMO_ROWS
    sparsity: float = 0.25
    limit: int | None = None
    until: str = "report"
    batch_size: int = 32
    overwrite: bool = False
    progress: bool = True


def run_demo(options: DemoOptions) -> CompareResult:
    """Run the demo up to ``options.until``; an interrupted one is continued.

    Raises:
        StreamlineBenchError: nothing could be run.
    """
    payload = bundled_request(
        {
            "model": BUNDLED,
            "recipes": list(options.rows),
            "set": {"sparsity": options.sparsity},
            "limit": options.limit,
            "batch_size": str(options.batch_size),
            "text": BUNDLED,
        }
    )
    return compare_request(
        make_request(payload),
        options.output,
        until=options.until,
        progress=options.progress,
        overwrite=options.overwrite,
    )
