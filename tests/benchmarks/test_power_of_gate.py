"""What the simulation of the gate on speed shows, in small."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import power_of_gate
from power_of_gate import ci_year, share_of_alarms


def test_a_loss_is_seen_and_noise_is_not() -> None:
    for gate in ("base", "history"):
        lost = share_of_alarms(gate, 10, 0.01, 0.05, 0.02, 60)
        same = share_of_alarms(gate, 10, 0.01, 0.0, 0.02, 60)
        assert lost > 0.85 and same <= 0.05, gate
    assert share_of_alarms("base", 10, 0.01, 0.03, 0.02, 60) > 0.8


@pytest.mark.parametrize("seed", [0, 1])
def test_a_wandering_machine_raises_few_alarms(seed: int) -> None:
    assert ci_year(3, 0.01, 0.02, seed) <= 0.05


def test_what_was_simulated_is_not_simulated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    monkeypatch.setattr(power_of_gate, "share_of_alarms", lambda *how: calls.append(how) or 0.5)
    monkeypatch.setattr(power_of_gate, "ci_year", lambda *how: calls.append(how) or 0.25)
    output = tmp_path / "kept.json"
    arguments = ["x", "--repetitions", "40", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    power_of_gate.main()
    first, shown = len(calls), capsys.readouterr().out
    assert first == len(json.loads(output.read_text())) and "50.0" in shown and "25.0" in shown
    power_of_gate.main()
    assert len(calls) == first and capsys.readouterr().out == shown
