"""Run folder -> ``leaderboard.json``; CSV, Markdown, HTML and model cards are views of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamline_bench.report.run_file import (
    NoiseRun,
    RunFile,
    RunRow,
    read_run_file,
    write_run_file,
)

if TYPE_CHECKING:
    from streamline_bench.report.build import build_report

__all__ = ["NoiseRun", "RunFile", "RunRow", "build_report", "read_run_file", "write_run_file"]


def __getattr__(name: str) -> Any:
    """``build_report`` on first use: whoever only writes a run file needs no pandas."""
    if name == "build_report":
        from streamline_bench.report.build import build_report

        return build_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
