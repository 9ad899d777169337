"""The comparison with the authors' script runs on folders of lm-eval, and finds what differs.

In place of their script stands one with the same interface, by its description: population
standard deviations, a plain softmax, and of m agreements the first m weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import stability_vs_script

SCRIPT = """
import json
from pathlib import Path
import numpy as np

def calculate_stability(*files_and_labels):
    *files, labels = files_and_labels
    pruned, dense = (list(json.loads(Path(name).read_text()).values()) for name in files)
    values = [[question["label: " + label]["PPL"] for label in labels] for question in dense]
    weights = np.exp(np.std(values, axis=1))
    right = [np.array([q["prediction"] == q["gold"] for q in run]) for run in (pruned, dense)]
    return sum((weights / weights.sum())[: (right[0] == right[1]).sum()]) OFF
"""


@pytest.mark.parametrize(("off", "code"), [("", 0), ("+ 1e-6", 1)])
def test_two_folders_of_lm_eval(
    off: str,
    code: int,
    lm_eval_outputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("OFF", off))
    folders = [str(lm_eval_outputs / name) for name in ("dense", "pruned")]
    assert stability_vs_script.main(["--script", str(script), *folders]) == code
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    found = {line[0].lstrip("| "): line for line in lines}
    assert {"toy_mc", "toy_fill", "mean"} <= found.keys()
    assert found["toy_fill"][4] == ("NO" if code else "yes")
