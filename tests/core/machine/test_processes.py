"""A process on the leash takes along everything it started, whichever end comes first."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LEASHED = """
import subprocess, sys
from streamline_bench.core.machine.processes import hold_leash
hold_leash()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
sys.stdin.read()  # ends with the starter, as fast as the leash does
"""
STARTER = """
import sys, time
from pathlib import Path
from streamline_bench.core.machine.processes import LeashedProcess
with open(sys.argv[1], "wb") as log:
    process = LeashedProcess([sys.executable, "-c", sys.argv[2]], log, piped=True)
    print(process._process.stdout.readline().decode(), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("attempt", range(3))
def test_children_end_when_the_starter_is_killed(
    ended: Callable[..., bool], tmp_path: Path, attempt: int
) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path / "log"), LEASHED], stdout=subprocess.PIPE
    )
    with starter:
        assert starter.stdout is not None
        child = int(starter.stdout.readline())
        assert not ended(child, seconds=0)
        starter.send_signal(signal.SIGKILL)
    assert ended(child)
