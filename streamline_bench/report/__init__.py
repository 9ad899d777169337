"""Run folder -> ``leaderboard.json``; CSV, Markdown, HTML and model cards are views of it."""

from __future__ import annotations

from streamline_bench.report.data.run_folder import (
    NoiseRun,
    RunFile,
    RunRow,
    read_run_file,
    write_run_file,
)
from streamline_bench.report.report import build_report

__all__ = ["NoiseRun", "RunFile", "RunRow", "build_report", "read_run_file", "write_run_file"]
