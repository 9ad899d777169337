"""The transformers engine: exact lengths, any checkpoint, one static batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streamline_bench.throughput import Setup, Workload, measure
from streamline_bench.throughput.engines import EngineSettings
from streamline_bench.throughput.engines.hf import TransformersEngine
from streamline_bench.throughput.record import PAPER_FIGURES

WORKLOAD = Workload(
    batch_sizes=(1, 3), prompt_tokens=6, output_tokens=4, blocks=1, rounds=2, warmup_rounds=0
)


def loaded(folder: Path, **changes: object) -> tuple[TransformersEngine, object]:
    engine = TransformersEngine()
    settings = EngineSettings(model=str(folder), sequence_tokens=16, **changes)  # type: ignore[arg-type]
    return engine, engine.load(settings)


def test_the_end_of_sequence_stops_nothing(make_tiny_model: Callable[..., Path]) -> None:
    """A model whose every token is the end of sequence still gives all tokens."""
    folder = make_tiny_model("llama", num_hidden_layers=1, eos_token_id=list(range(100)))
    engine, _ = loaded(folder)
    assert engine.generate([[5, 6, 7], [8, 9, 10]], 5) == [5, 5]


def test_what_it_says_of_a_model(tiny_llama: Path) -> None:
    import torch
    import transformers

    engine, found = loaded(tiny_llama, attention="eager")
    assert found.vocab_size == 100  # type: ignore[attr-defined]
    assert found.reserved == [0, 1, 2]  # type: ignore[attr-defined]
    assert found.engine_version == transformers.__version__  # type: ignore[attr-defined]
    assert found.flags["attention"] == "eager"  # type: ignore[attr-defined]
    assert found.flags["threads"] == torch.get_num_threads()  # type: ignore[attr-defined]
    assert engine.device_peak_bytes() is None


def test_dense_and_attached_models_side_by_side(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from streamline_bench.modeling import StreamlineForCausalLM, streamline_config

    attached = {"after_layer": 1, "kind": "swiglu_res", "intermediate_size": 48}
    config = streamline_config(AutoConfig.from_pretrained(tiny_llama), [attached])
    StreamlineForCausalLM.from_config(config).save_pretrained(tmp_path / "attached")
    record = measure(
        {"dense": tiny_llama, "attached": tmp_path / "attached", "unknown": unknown(tmp_path)},
        dense="dense",
        workload=WORKLOAD,
        setup=Setup(device="cpu", dtype="bfloat16"),
        progress=False,
    )
    dense, other, refused = record.models
    for model in (dense, other):
        assert model.status == "ok", model.reason
        assert [p.rounds[0].output_tokens for p in model.points] == [4, 12]
        assert model.kv_bytes_per_token == 6 * 2 * 16 * 2
        assert all(p.ratio is not None for p in model.points)
    assert refused.status == "failed" and "novel" in str(refused.reason)
    assert record.dtype == "bfloat16" and record.clock == "cpu"
    assert all(p.ideal is not None and p.ideal.ratio < 1 for p in other.points)
    assert record.environment.threads == record.flags["threads"]


def unknown(folder: Path) -> Path:
    """A checkpoint of a family that transformers does not know."""
    import json

    import numpy as np
    from safetensors.numpy import save_file

    (folder / "novel").mkdir()
    save_file({"w": np.zeros((2, 2), np.float32)}, folder / "novel" / "model.safetensors")
    (folder / "novel" / "config.json").write_text(json.dumps({"model_type": "novel"}))
    return folder / "novel"


def test_paper_mode_is_one_sequence_with_the_papers_figures(tiny_llama: Path) -> None:
    record = measure(
        {"dense": tiny_llama}, dense="dense", workload=WORKLOAD, mode="paper", progress=False
    )
    assert record.workload.batch_sizes == (1,)
    assert record.flags["attention"] == "eager"
    assert record.paper == PAPER_FIGURES
    quoted = {19.87: 1.0, 25.68: 1.2924, 25.88: 1.3025, 27.20: 1.3689, 25.91: 1.3040}
    for row in record.paper:
        assert row.ratio == pytest.approx(quoted[row.tokens_per_second], abs=1e-4)


BROUGHT_ALONG = """
from transformers import LlamaConfig, LlamaForCausalLM


class MineConfig(LlamaConfig):
    model_type = "mine"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_code_that_a_model_brings_along_runs_only_where_asked(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "mine"))
    (folder / "code.py").write_text(BROUGHT_ALONG, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes = {"AutoConfig": "code.MineConfig", "AutoModelForCausalLM": "code.MineForCausalLM"}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    statuses = [
        measure(
            {"mine": folder},
            workload=WORKLOAD,
            setup=Setup(device="cpu", trust_remote_code=trusted),
            progress=False,
        ).models[0].status
        for trusted in (True, False)
    ]  # fmt: skip
    assert statuses == ["ok", "failed"]
