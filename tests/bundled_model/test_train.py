"""Training: batches depend on seed and step only; a killed training resumes to the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bundled_model.skills import EVALUATED, weights_at
from bundled_model.stream import batch_at
from bundled_model.train import CHECKPOINT, TrainingConfig, main, schedule
from bundled_model.vocabulary import BOS, EOS, tokens
from safetensors.torch import load_file

from streamline_bench.errors import OutputError

TINY = (
    "--steps=30 --rows=2 --length=128 --hidden=16 --intermediate=16 --layers=2 --heads=2 "
    "--kv-heads=1 --warmup=4 --checkpoint-every=1"
).split()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    first, again, other = (batch_at(0, step, 4, 128, 10.0) for step in (3, 3, 4))
    assert _same(first.input_ids, again.input_ids)
    assert _same(first.target_weights, again.target_weights)
    assert not _same(first.input_ids, other.input_ids)


def test_rows_hold_whole_documents_between_bos_and_eos() -> None:
    batch = batch_at(0, 5, 8, 128, 10.0)
    vocabulary = tokens()
    for ids, numbers, positions in zip(
        batch.input_ids, batch.document_ids, batch.position_ids, strict=True
    ):
        for number in range(1, int(numbers.max()) + 1):
            inside = numbers == number
            document = ids[inside]
            assert vocabulary[document[0]] == BOS
            assert vocabulary[document[-1]] == EOS
            assert positions[inside].tolist() == list(range(len(document)))
        assert not ids[numbers == 0].any()


def test_copying_and_looking_up_come_first() -> None:
    first, last = weights_at(0), weights_at(10_000)
    assert first["echo"] > last["echo"]
    assert first["pairs"] > last["pairs"]
    assert all(last[skill] > 0 for skill in EVALUATED)


def test_schedule_warms_up_and_decays() -> None:
    config = TrainingConfig(steps=100, warmup=10, final_ratio=0.1)
    factors = [schedule(step, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=0.01)


def _start(output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bundled_model.train", "--output", str(output)]
    return subprocess.Popen([*command, *TINY], cwd=Path(__file__).parents[1])


def test_killed_training_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert main(["--output", str(tmp_path / "whole"), *TINY]) == 0

    killed = _start(tmp_path / "killed")
    checkpoint = tmp_path / "killed" / CHECKPOINT
    while not checkpoint.exists() and killed.poll() is None:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert 0 < torch.load(checkpoint, weights_only=True)["step"] < 30

    assert main(["--output", str(tmp_path / "killed"), "--resume", *TINY]) == 0
    whole, resumed = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed")
    )
    assert whole.keys() == resumed.keys()
    assert all(_same(whole[name], resumed[name]) for name in whole)


def test_resuming_with_another_configuration_is_refused(tmp_path: Path) -> None:
    main(["--output", str(tmp_path), *TINY, "--steps=1"])
    with pytest.raises(OutputError, match="same options"):
        main(["--output", str(tmp_path), "--resume", *TINY, "--steps=2"])
