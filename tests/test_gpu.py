"""The same results on a GPU as on the processor. Skipped where there is no CUDA device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.recipe.schema import ReplacementSpec, TrainingSpec
from streamline_bench.core.scan import scan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

DEVICE = "cuda"


@pytest.fixture
def tokens() -> CalibrationTokens:
    ids = torch.randint(0, 100, (8, 64), generator=torch.Generator().manual_seed(0))
    return CalibrationTokens.from_tensors(ids)


def load(folder: Path, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)


def test_scan(tiny_llama: Path, tokens: CalibrationTokens) -> None:
    here, there = (
        scan(load(tiny_llama, device), tokens, progress=False).cosine for device in ("cpu", DEVICE)
    )
    assert np.allclose(here, there, atol=1e-4)


def test_loglikelihoods(tiny_llama: Path) -> None:
    from lm_eval.api.instance import Instance

    from streamline_bench.harness.lm import StreamlineLM

    requests = [
        Instance(
            request_type="loglikelihood", doc={}, arguments=(f"w1 w2 w{i}", f" w{i + 3} w7"), idx=0
        )
        for i in range(20)
    ]
    here, there = (
        StreamlineLM(str(tiny_llama), device=device, dtype="float32").loglikelihood(
            requests, disable_tqdm=True
        )
        for device in ("cpu", DEVICE)
    )
    assert [a[0] for a in there] == pytest.approx([a[0] for a in here], abs=1e-3)
    assert [a[1] for a in there] == [a[1] for a in here]


@pytest.mark.parametrize("objective", ["mse", "lm"])
def test_training(
    tiny_llama: Path, tokens: CalibrationTokens, tmp_path: Path, objective: str
) -> None:
    from streamline_bench.core.training.trainer import train_replacement

    losses = {}
    for device in ("cpu", DEVICE):
        result = train_replacement(
            load(tiny_llama, device),
            start=2,
            n=3,
            spec=ReplacementSpec(kind="layer"),
            training=TrainingSpec.model_validate(
                {"objective": objective, "batch_size": 2, "validation_share": 0.25, "lr": 1e-3}
            ),
            tokens=tokens,
            work=tmp_path / device,
            seed=0,
            device=device,
            progress=False,
        )
        losses[device] = result.summary["best_loss"]
    assert losses[DEVICE] == pytest.approx(losses["cpu"], rel=1e-2)


@contextmanager
def waits() -> Iterator[list[str]]:
    """Note where our own code waits for the device; transformers looks into masks by itself."""
    found: list[str] = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for each in caught:
        if "synchronizing" in str(each.message) and "streamline_bench" in each.filename:
            found.append(f"{each.filename}:{each.lineno}")


def test_a_wait_is_seen() -> None:
    """By the warning that the tests below look for."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        float(torch.ones((), device=DEVICE))
        torch.cuda.set_sync_debug_mode("default")
    assert any("synchronizing" in str(each.message) for each in caught)


@pytest.mark.parametrize("objective", ["relative_mse", "lm"])
def test_the_passes_of_a_step_wait_for_nothing_of_ours(
    tiny_llama: Path, tokens: CalibrationTokens, objective: str
) -> None:
    from streamline_bench.core.training.batch import make_batch
    from streamline_bench.core.training.block import Student, Teacher
    from streamline_bench.core.training.loop import STATE_ERRORS, LmObjective, StateObjective

    model = load(tiny_llama, DEVICE)
    student = Student(model, 2, ReplacementSpec(kind="layer"), seed=0)
    teacher = Teacher(model, 2, 3, student.num_calls)
    states = StateObjective(student, STATE_ERRORS["relative_mse"])

    def passes() -> None:
        batch = make_batch(tokens, torch.arange(4), torch.device(DEVICE))
        if objective == "lm":
            LmObjective(model).loss_sum(batch, None).backward()
        else:
            states.loss_sum(batch, teacher).backward()

    passes()  # what is made once
    with waits() as found:
        passes()
    assert found == []


def test_a_scan_waits_as_often_for_many_batches_as_for_few(
    tiny_llama: Path, tokens: CalibrationTokens
) -> None:
    model, counts = load(tiny_llama, DEVICE), []
    for rows in (2, 2, 8):
        some = CalibrationTokens.from_tensors(tokens.input_ids[:rows])
        with waits() as found:
            scan(model, some, batch_size=1, progress=False)
        counts.append(len(found))
    assert counts[1] == counts[2]  # the first one makes what is made once


def test_scoring_waits_once_for_each_batch(tiny_llama: Path) -> None:
    from lm_eval.api.instance import Instance

    from streamline_bench.harness.lm import StreamlineLM

    lm = StreamlineLM(str(tiny_llama), device=DEVICE, dtype="float32", batch_size=2)
    passes: list[int] = []
    lm.model.register_forward_pre_hook(lambda *_: passes.append(1))

    def score(count: int) -> tuple[int, int]:
        passes.clear()
        requests = [
            Instance(
                request_type="loglikelihood", doc={}, arguments=(f"w1 w{i}", f" w{i + 3}"), idx=0
            )
            for i in range(count)
        ]
        with waits() as found:
            lm.loglikelihood(requests, disable_tqdm=True)
        return len(found), len(passes)

    score(4)
    few, many = score(12), score(48)
    assert many[1] > few[1]
    assert many[0] - few[0] <= many[1] - few[1]


def test_generation_counts_every_token(tiny_llama: Path) -> None:
    from streamline_bench.throughput.engines import EngineSettings, engine_class

    engine = engine_class("hf")()
    loaded = engine.load(
        EngineSettings(model=str(tiny_llama), device=DEVICE, max_batch=3, sequence_tokens=32)
    )
    assert loaded.device_name == torch.cuda.get_device_name()
    assert engine.generate([[5, 6, 7]] * 3, 16) == [16] * 3
    peak = engine.device_peak_bytes()
    assert peak is not None and peak > 0
