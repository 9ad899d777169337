"""The same results on a GPU as on the processor. Skipped where there is no CUDA device."""

from __future__ import annotations

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
