"""``-q`` draws no progress bar, in whatever library it would be drawn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RECORDER = """
import sys
import tqdm.std
made = []
begin = tqdm.std.tqdm.__init__
def record(bar, *values, **options):
    made.append((options.get("desc"), options.get("disable")))
    begin(bar, *values, **options)
tqdm.std.tqdm.__init__ = record
from streamline_bench.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended.code
print(len(made), [name for name, disabled in made if disabled is not True])
"""


@pytest.mark.slow
@pytest.mark.parametrize("quiet", [True, False])
def test_compress_makes_no_bar_when_quiet(recipe_source: Path, tmp_path: Path, quiet: bool) -> None:
    command = [
        "compress", str(recipe_source), "--recipe", "streamline", "--n-layers", "2",
        "--device", "cpu", "--set", "sequence_length=16", "--set", "training.min_steps=2",
        "--set", "training_samples=16", "--set", "calibration_samples=8", "-o", str(tmp_path / "o"),
    ]  # fmt: skip
    code = [sys.executable, "-c", RECORDER, *command, *(["-q"] * quiet)]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, _, shown = done.stdout.splitlines()[-1].partition(" ")
    assert int(count) > 0  # bars are made, and hidden
    assert (shown == "[]") is quiet
    if quiet:
        assert done.stderr == ""
