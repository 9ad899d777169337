"""``kill -9`` at random moments changes nothing about the leaderboard."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_killed_three_times_the_leaderboard_is_the_same(repository: Path) -> None:
    script = repository / "tests" / "benchmarks" / "compare_kill_resume.py"
    done = subprocess.run(
        [sys.executable, str(script), "--recipes", "last_layers,streamline_none", "--limit", "4",
         "--tasks", "streamline_demo_pairs", "--seed", "1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the leaderboards are the same" in done.stdout
    assert " of scoring together, " in done.stdout
