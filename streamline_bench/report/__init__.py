"""Run folder -> leaderboard -> report.html, report.md, leaderboard.csv and leaderboard.json."""

from __future__ import annotations

from streamline_bench.report.run_folder import (
    RunFile,
    RunRow,
    build_report,
    read_run_file,
    write_run_file,
)

__all__ = ["RunFile", "RunRow", "build_report", "read_run_file", "write_run_file"]
