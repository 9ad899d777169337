"""A killed training goes on from its last checkpoint and ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from streamline_bench.core.training.state import TrainingState, load_state, save_state

CASES = {
    "mse-streamed": ("mse", 1, 1.0),
    "mse-stored": ("mse", 2, 1.0),
    "mse-recomputed": ("mse", 2, 0.0),
    "lm": ("lm", 1, 1.0),
}

# One process imports; every training runs in a fork of it, so that a kill hits a real process.
TRAININGS = """
import json, os, signal, sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_llama import small_llama

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.training import loop, train_replacement
from streamline_bench.core.recipe.schema import ReplacementSpec, TrainingSpec

STEP = loop.Loop._step

def train(work, objective, epochs, cache_gb, kill_after):
    def step_then_die(self, *args):
        loss = STEP(self, *args)
        if self.state.step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    loop.Loop._step = step_then_die
    model = small_llama()
    ids = torch.randint(0, 50, (24, 8), generator=torch.Generator().manual_seed(2))
    training = TrainingSpec(
        objective=objective, epochs=epochs, batch_size=2, checkpoint_every=4, lr=1e-2,
        cache_gb=cache_gb,
    )
    result = train_replacement(
        model, start=1, n=2, spec=ReplacementSpec(kind="layer"), training=training,
        tokens=CalibrationTokens.from_tensors(ids), work=work, seed=3, progress=False,
    )
    save_file(result.state, work / "result.safetensors")
    rows = [(row["step"], row["train_loss"], row["val_loss"]) for row in result.curve]
    (work / "losses.json").write_text(json.dumps(rows))

def forked(*arguments):
    child = os.fork()
    if child == 0:
        try:
            train(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

torch.set_num_threads(1)
folder, cases, codes = Path(sys.argv[1]), json.loads(sys.argv[2]), {}
for name, case in cases.items():
    whole, killed = folder / name / "whole", folder / name / "killed"
    # Killed two steps behind a checkpoint: these are lost, and done again.
    codes[name] = [forked(whole, *case, -1), forked(killed, *case, 6)]
    codes[name] += [(killed / "result.safetensors").exists(), forked(killed, *case, -1)]
(folder / "codes.json").write_text(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Path:
    """Folder with the outcome of every case: uninterrupted, and killed and resumed."""
    folder = tmp_path_factory.mktemp("trainings")
    command = [sys.executable, "-c", TRAININGS, str(folder), json.dumps(CASES)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with forks.used():
        subprocess.run(command, env=environment, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_kill_and_resume_is_bit_equal(trainings: Path, case: str) -> None:
    codes = json.loads((trainings / "codes.json").read_text())[case]
    assert codes == [0, -signal.SIGKILL, False, 0]
    whole, resumed = (
        load_file(trainings / case / name / "result.safetensors") for name in ("whole", "killed")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [(trainings / case / name / "losses.json").read_text() for name in ("whole", "killed")]
    assert losses[0] == losses[1]


def example() -> TrainingState:
    return TrainingState(
        step=7,
        weights={"a": torch.randn(3)},
        best={"a": torch.randn(3)},
        moments={"0.exp_avg": torch.randn(3), "0.step": torch.tensor(7.0)},
        best_step=5,
        best_loss=0.1 + 0.2,
        tokens=99,
        pending=(1 / 3, 4),
        curve=[{"step": 7, "train_loss": None}],
    )


def test_state_round_trip(tmp_path: Path) -> None:
    state = example()
    save_state(tmp_path, "key", state)
    loaded = load_state(tmp_path, "key")
    assert loaded is not None
    for name in ("step", "best_step", "best_loss", "tokens", "pending", "curve"):
        assert getattr(loaded, name) == getattr(state, name)
    for group in ("weights", "best", "moments"):
        ours: dict[str, Any] = getattr(loaded, group)
        theirs = getattr(state, group)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["training.safetensors"]


def test_state_of_another_training_is_not_taken_up(tmp_path: Path) -> None:
    save_state(tmp_path, "key", example())
    assert load_state(tmp_path, "other") is None
    assert load_state(tmp_path / "nowhere", "key") is None


def test_torn_file_is_not_taken_up(tmp_path: Path) -> None:
    save_state(tmp_path, "key", example())
    path = tmp_path / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert load_state(tmp_path, "key") is None
