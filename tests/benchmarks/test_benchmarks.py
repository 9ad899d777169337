"""pytest-benchmark suite: each group holds one of our steps and its peer, in one run.

``tox -e bench`` prints a table per group whose figures in brackets are the ratios within the group.
In an ordinary test run (``--benchmark-disable``) every step runs once and its result is checked.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import scoring_vs_hf

from streamline_bench.core.calibration import CalibrationTokens
from streamline_bench.core.importance import scan
from streamline_bench.stability.metrics import stability


@pytest.fixture(scope="module")
def scoring_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scoring")
    scoring_vs_hf.build_model(folder, "tiny")
    return folder


@pytest.fixture(scope="module")
def workload() -> Any:
    return scoring_vs_hf.build_workload("choice6", questions=8)


@pytest.fixture(scope="module")
def stock_answers(scoring_model: Path, workload: Any) -> list[Any]:
    from lm_eval.models.huggingface import HFLM

    return scoring_vs_hf.answer(HFLM(str(scoring_model), device="cpu"), workload)


@pytest.mark.benchmark(group="multiple choice, tokens of about 6")
@pytest.mark.parametrize("model", ["hf", "streamline"])
def test_scoring(
    benchmark: Any, model: str, scoring_model: Path, workload: Any, stock_answers: list[Any]
) -> None:
    from lm_eval.models.huggingface import HFLM

    from streamline_bench.harness.lm import StreamlineLM

    lm = {"hf": HFLM, "streamline": StreamlineLM}[model](str(scoring_model), device="cpu")
    answers = benchmark(scoring_vs_hf.answer, lm, workload)
    for (ours, _), (stock, _) in zip(answers, stock_answers, strict=True):
        assert ours == pytest.approx(stock, abs=1e-4)


@pytest.fixture(scope="module")
def scan_inputs(tiny_llama: Path) -> tuple[Any, CalibrationTokens]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = torch.randint(0, 100, (4, 128), generator=torch.Generator().manual_seed(0))
    return model, CalibrationTokens.from_tensors(ids)


@pytest.mark.benchmark(group="scan of all blocks, beside a forward pass")
@pytest.mark.parametrize("step", ["forward", "scan"])
def test_scan(benchmark: Any, step: str, scan_inputs: tuple[Any, CalibrationTokens]) -> None:
    model, tokens = scan_inputs

    def forward() -> Any:
        with torch.no_grad():
            return [model(input_ids=ids, use_cache=False).logits for ids, _ in tokens.batches(1)]

    if step == "forward":
        assert len(benchmark(forward)) == len(tokens)
    else:
        similarity = benchmark(scan, model, tokens, progress=False)
        assert np.allclose(np.diagonal(similarity.cosine), 1.0)


@pytest.mark.benchmark(group="stability of 100,000 pairs")
@pytest.mark.parametrize("how", ["loop", "vectorised"])
def test_stability(benchmark: Any, how: str) -> None:
    draw = np.random.default_rng(0)
    std, agree = draw.random(100_000), draw.random(100_000) < 0.8

    def loop() -> float:
        weights = [float(np.exp(value)) for value in std]
        kept = [w for w, same in zip(weights, agree, strict=True) if same]
        return sum(kept) / sum(weights)

    value = benchmark(loop if how == "loop" else lambda: stability(std, agree))
    assert value == pytest.approx(loop(), rel=1e-9)
