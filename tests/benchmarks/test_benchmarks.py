"""pytest-benchmark suite: each group holds one of our steps and its peer, in one run.

``tox -e bench`` prints a table per group whose figures in brackets are the ratios within the group,
stores them and checks the ratios (see run_benchmarks.py). In an ordinary test run
(``--benchmark-disable``) every step runs once and its result is checked.

Steps that run a model do so on a GPU, if there is one, and wait for it; they leave the tokens of a
call and the tokens per second in ``extra_info``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import scoring_vs_hf
import search_vs_naive
import surgery_vs_copy

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.recipe.schema import ReplacementSpec, TrainingSpec
from streamline_bench.core.scan import scan
from streamline_bench.stability.statistics.stability import stability

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., Any]:
    """Return a function that benchmarks ``step``, device included, and counts its tokens."""

    def run(step: Callable[[], Any], *, tokens: int | None = None, **pedantic: Any) -> Any:
        def waited() -> Any:
            result = step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            return result

        result = benchmark.pedantic(waited, **pedantic) if pedantic else benchmark(waited)
        benchmark.extra_info["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
        if tokens is not None:
            benchmark.extra_info["tokens"] = tokens
            if benchmark.stats is not None:
                benchmark.extra_info["tokens_per_second"] = tokens / benchmark.stats["median"]
        return result

    return run


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

    return scoring_vs_hf.answer(HFLM(str(scoring_model), device=DEVICE), workload)


@pytest.mark.benchmark(group="scoring")
@pytest.mark.parametrize("model", ["hf", "streamline"])
def test_scoring(
    measure: Any, model: str, scoring_model: Path, workload: Any, stock_answers: list[Any]
) -> None:
    """Multiple choice with choices of about six tokens, by the harness's class and by ours."""
    from lm_eval.models.huggingface import HFLM

    from streamline_bench.harness.lm import StreamlineLM

    lm = {"hf": HFLM, "streamline": StreamlineLM}[model](str(scoring_model), device=DEVICE)
    tokens = sum(len(lm.tok_encode("".join(request.args))) for request in workload.requests)
    answers = measure(lambda: scoring_vs_hf.answer(lm, workload), tokens=tokens)
    tolerance = 1e-4 if DEVICE == "cpu" else 1e-2
    for (ours, _), (stock, _) in zip(answers, stock_answers, strict=True):
        assert ours == pytest.approx(stock, abs=tolerance)


@pytest.fixture(scope="module")
def calibrated(tiny_llama: Path) -> tuple[Any, CalibrationTokens]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval().to(DEVICE)
    ids = torch.randint(0, 100, (8, 128), generator=torch.Generator().manual_seed(0))
    return model, CalibrationTokens.from_tensors(ids)


def forward(model: Any, tokens: CalibrationTokens) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            model(input_ids=ids.to(DEVICE), use_cache=False).logits for ids, _ in tokens.batches(1)
        ]


@pytest.mark.benchmark(group="scan")
@pytest.mark.parametrize("step", ["forward", "scan"])
def test_scan(measure: Any, step: str, calibrated: tuple[Any, CalibrationTokens]) -> None:
    """The similarity of all boundaries, beside a forward pass over the same tokens."""
    model, tokens = calibrated
    if step == "forward":
        assert len(measure(lambda: forward(model, tokens), tokens=8 * 128)) == len(tokens)
    else:
        similarity = measure(lambda: scan(model, tokens, progress=False), tokens=8 * 128)
        assert np.allclose(np.diagonal(similarity.cosine), 1.0)


@pytest.fixture(scope="module")
def searched() -> tuple[Any, CalibrationTokens]:
    sizes = {"layers": 12, "hidden": 64, "length": 48, "samples": 2, "vocabulary": 200}
    return search_vs_naive.build(argparse.Namespace(**sizes, device=DEVICE))


@pytest.mark.benchmark(group="search")
@pytest.mark.parametrize("how", ["naive", "shared"])
def test_search(measure: Any, how: str, searched: tuple[Any, CalibrationTokens]) -> None:
    """The first step of SLEB, with the layers below shared, or each candidate from the bottom."""
    model, tokens = searched
    step = {"naive": search_vs_naive.naive_sleb, "shared": search_vs_naive.shared_sleb}[how]
    found = measure(lambda: step(model, tokens, 1), tokens=2 * 48, rounds=3)
    assert found == search_vs_naive.naive_sleb(model, tokens, 1)


@pytest.fixture(scope="module")
def depth_pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model without three of its twelve layers, cut at four places."""
    from streamline_bench.compression import compress, load_recipe

    folder, made = tmp_path_factory.mktemp("text"), {}
    for start in (3, 5, 7, 9):
        given = {"method": "given_layers", "parameters": {"layers": list(range(start, start + 3))}}
        recipe = load_recipe("random_layers", {"n_layers": 3}).model_copy(update=given)
        made[str(start)] = compress("bundled", recipe, folder / str(start), progress=False)
    return made


@pytest.mark.benchmark(group="text")
@pytest.mark.parametrize("how", ["apart", "together"])
def test_text(measure: Any, how: str, depth_pruned: dict[str, Path]) -> None:
    """Token distributions of four depth-pruned models against the dense one's, files included."""
    from streamline_bench.divergence import Other, token_divergence, token_divergences

    others = {label: Other(folder) for label, folder in depth_pruned.items()}
    text = " ".join(f"the cat saw {i} dogs near the old house ." for i in range(400))
    options: dict[str, Any] = {"window": 128, "batch_size": 16, "device": DEVICE, "progress": False}

    def apart() -> dict[str, Any]:
        return {
            k: token_divergence("bundled", v.name, [text], **options) for k, v in others.items()
        }

    def together() -> dict[str, Any]:
        return token_divergences("bundled", others, lambda: [text], **options)

    found = measure({"apart": apart, "together": together}[how], rounds=3)
    assert len({each.kl.value for each in found.values()}) == 4
    if how == "together":
        assert found["7"] == token_divergence("bundled", others["7"].name, [text], **options)


@pytest.mark.benchmark(group="distillation")
@pytest.mark.parametrize("step", ["forward", "train"])
def test_distillation(
    measure: Any, step: str, calibrated: tuple[Any, CalibrationTokens], tmp_path: Path
) -> None:
    """An epoch of training a replacement for half of the layers, beside a forward pass."""
    from streamline_bench.core.training.trainer import train_replacement

    model, tokens = calibrated
    if step == "forward":
        measure(lambda: forward(model, tokens), tokens=8 * 128)
        return
    training = TrainingSpec(objective="mse", batch_size=2, validation_share=0.25, epochs=1, lr=1e-3)

    def train() -> Any:
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        return train_replacement(
            model,
            start=2,
            n=3,
            spec=ReplacementSpec(kind="ffn"),
            training=training,
            tokens=tokens,
            work=tmp_path / "work",
            seed=0,
            device=DEVICE,
            progress=False,
            weights_sha256="0" * 64,
        )

    result = measure(train, tokens=8 * 128)
    assert result.summary["steps"] == 3
    assert np.isfinite(result.summary["best_loss"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of 60 MB, and files with the bytes that are left of it."""
    folder = tmp_path_factory.mktemp("shards")
    surgery_vs_copy.write_checkpoint(folder / "source", 6e7)
    surgery_vs_copy.surgery(folder / "source", folder / "kept")
    return folder / "source", folder / "kept"


@pytest.mark.benchmark(group="surgery")
@pytest.mark.parametrize("step", ["copy", "surgery"])
def test_surgery(measure: Any, step: str, shards: tuple[Path, Path], tmp_path: Path) -> None:
    """Six of 24 layers removed from a checkpoint on disk, beside copying the bytes that stay."""
    target = tmp_path / "target"

    def empty() -> None:
        shutil.rmtree(target, ignore_errors=True)

    action, source = {
        "copy": (surgery_vs_copy.plain_copy, shards[1]),
        "surgery": (surgery_vs_copy.surgery, shards[0]),
    }[step]
    measure(lambda: action(source, target), setup=empty, rounds=5)
    config = json.loads((target / "config.json").read_text())
    assert config["num_hidden_layers"] == surgery_vs_copy.LAYERS * 3 // 4


@pytest.mark.benchmark(group="stability")
@pytest.mark.parametrize("how", ["loop", "vectorised"])
def test_stability(measure: Any, how: str) -> None:
    """Of 100,000 pairs."""
    draw = np.random.default_rng(0)
    std, agree = draw.random(100_000), draw.random(100_000) < 0.8

    def loop() -> float:
        weights = [float(np.exp(value)) for value in std]
        kept = [w for w, same in zip(weights, agree, strict=True) if same]
        return sum(kept) / sum(weights)

    value = measure(loop if how == "loop" else lambda: stability(std, agree))
    assert value == pytest.approx(loop(), rel=1e-9)


@pytest.fixture(scope="module")
def run_folder(opencompass_files: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models on two tasks of 500 questions."""
    from streamline_bench.report.run_file import RunFile, RunRow, write_run_file

    folder = tmp_path_factory.mktemp("run")
    labels = ("dense", "first", "second")
    for seed, label in enumerate(labels):
        for task in ("arc", "piqa"):
            entries = opencompass_files.ppl(500, seed=seed)
            opencompass_files.write(folder / label, task, entries)
    rows = [RunRow(label=label, eval=label) for label in labels]
    write_run_file(folder, RunFile(dense="dense", rows=rows))
    return folder


@pytest.mark.benchmark(group="report")
@pytest.mark.parametrize("step", ["read", "report"])
def test_report(measure: Any, step: str, run_folder: Path) -> None:
    """The statistics of a run and its page, beside reading the answers."""
    from streamline_bench.report.build import build_report
    from streamline_bench.stability.readers.load import load_samples

    if step == "read":
        labels = ("dense", "first", "second")
        read = measure(lambda: [load_samples(run_folder / x, progress=False) for x in labels])
        assert [len(samples.frame) for samples in read] == [1000] * 3
    else:
        page = measure(lambda: build_report(run_folder, progress=False), rounds=3)
        assert page.is_file()


@pytest.mark.benchmark(group="throughput")
@pytest.mark.parametrize("layers", [12, 9])
def test_throughput(measure: Any, layers: int, make_tiny_model: Callable[..., Path]) -> None:
    """Greedy generation by the engine of ``streamline-bench throughput``: dense, a quarter less."""
    from streamline_bench.throughput.engines import EngineSettings, engine_class

    folder = make_tiny_model("llama", num_hidden_layers=layers, hidden_size=64)
    engine = engine_class("hf")()
    settings = EngineSettings(model=str(folder), device=DEVICE, max_batch=4, sequence_tokens=48)
    engine.load(settings)
    prompts = np.random.default_rng(0).integers(3, 100, (4, 16)).tolist()
    counts = measure(lambda: engine.generate(prompts, 32), tokens=4 * 32, rounds=5)
    assert counts == [32] * 4
