"""Multimodal folders: read as their text model, pruned there, written back whole."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.multimodal_models import CONFIGS, TEXT, build, image_inputs
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, MllamaConfig

from streamline_bench.compression import compress, load_recipe
from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.wrapper import wrapper_of
from streamline_bench.errors import ArchitectureError
from streamline_bench.harness.lm import StreamlineLM
from streamline_bench.modeling import register
from streamline_bench.modeling.loading import load_config, load_model, load_tokenizer

KEPT = [0, 3]
"""Of four layers, where two in the middle are removed."""

_models: dict[str, tuple[Path, Any]] = {}


@pytest.fixture
def model_of(
    tmp_path_factory: pytest.TempPathFactory, word_tokenizer: Any
) -> Callable[[str], tuple[Path, Any]]:
    """Return a function: model type -> folder and model in memory. Do not modify."""

    def made(model_type: str) -> tuple[Path, Any]:
        if model_type not in _models:
            folder = tmp_path_factory.mktemp(model_type)
            _models[model_type] = folder, build(model_type, folder)
            word_tokenizer.save_pretrained(folder)
            (folder / "preprocessor_config.json").write_text('{"size": 16}')
            (folder / "processing_own.py").write_text("# code of a processor\n")
            lines = [" ".join(f"w{(i * 7 + j * 13) % 80}" for j in range(40)) for i in range(30)]
            text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
            (folder / "calibration.jsonl").write_text(text)
        return _models[model_type]

    return made


def middle_removed(folder: Path, output: Path) -> Path:
    """Two of four layers, the protected ends excepted."""
    sizes = {"n_layers": 2, "parameters.protect_first": 1, "parameters.protect_last": 1}
    return compress(folder, load_recipe("random_layers", sizes), output, progress=False)


def text_model(model: Any) -> Any:
    inner = getattr(model, "model", model)
    inner = getattr(inner, "text_model", None) or inner.language_model
    return getattr(inner, "model", inner)


def cut(model: Any) -> None:
    """Remove layers in memory, by hand."""
    inner = text_model(model)
    inner.layers = torch.nn.ModuleList(inner.layers[layer] for layer in KEPT)
    inner.config.num_hidden_layers = len(KEPT)
    if getattr(inner.config, "layer_types", None):
        inner.config.layer_types = [inner.config.layer_types[layer] for layer in KEPT]
    for index, layer in enumerate(inner.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index


def logits(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **inputs).logits


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_text_model_is_read_pruned_and_written_back(
    model_type: str, model_of: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, dense = model_of(model_type)
    ids = torch.randint(3, 80, (2, 17))
    torch.testing.assert_close(
        logits(load_model(folder, device="cpu"), ids), logits(dense, ids), rtol=0, atol=1e-6
    )
    output = middle_removed(folder, tmp_path / "out")
    pruned, report = AutoModelForImageTextToText.from_pretrained(
        output, dtype=torch.float32, output_loading_info=True
    )
    assert type(pruned) is type(dense)
    assert not any(report.values())
    by_hand = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    cut(by_hand)
    expected = logits(by_hand.eval(), ids)
    assert torch.equal(logits(pruned.eval(), ids), expected)
    view = logits(load_model(output, device="cpu"), ids)
    torch.testing.assert_close(view, expected, rtol=0, atol=1e-6)
    seen, image = image_inputs(model_type)
    assert torch.equal(logits(pruned, seen, **image), logits(by_hand, seen, **image))
    new = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert pruned.generate(seen, **image, **new).shape == (1, seen.shape[1] + 3)


def test_everything_else_in_the_folder_is_kept(
    model_of: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, dense = model_of("mistral3")
    output = middle_removed(folder, tmp_path / "out")
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, output))
    before["text_config"]["num_hidden_layers"] = 2
    older = {
        k: after["text_config"].pop(k) for k in {*after["text_config"]} - {*before["text_config"]}
    }
    assert set(older) <= {"rope_theta", "torch_dtype"}
    assert older.get("rope_theta") == before["text_config"]["rope_parameters"]["rope_theta"]
    assert after == before
    for name in ("preprocessor_config.json", "processing_own.py", "tokenizer.json"):
        assert (output / name).read_bytes() == (folder / name).read_bytes()
    old, new = (load_file(f / "model.safetensors") for f in (folder, output))
    outside = {name for name in old if not name.startswith("language_model.model.layers.")}
    assert outside <= new.keys()
    assert all(torch.equal(old[name], new[name]) for name in outside)
    manifest = read_manifest(output)
    text = text_model(dense)
    head = dense.lm_head.weight.numel()
    assert manifest.parameters_before == sum(p.numel() for p in text.parameters()) + head
    whole = sum(p.numel() for p in dense.parameters())
    removed = sum(p.numel() for layer in text.layers[1:3] for p in layer.parameters())
    assert manifest.whole_folder == {
        "model_type": "mistral3", "parameters_before": whole, "parameters_after": whole - removed,
        "sparsity_reached": pytest.approx(removed / whole),
    }  # fmt: skip
    assert manifest.sparsity_reached == pytest.approx(removed / manifest.parameters_before)


def test_a_network_in_the_text_model_where_the_wrapper_takes_any_type(
    model_of: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = model_of("mistral3")
    recipe = load_recipe("ridge_map", {
        "n_layers": 2, "calibration": str(folder / "calibration.jsonl"), "sequence_length": 16,
    })  # fmt: skip
    output = compress(folder, recipe, tmp_path / "out", progress=False)
    register()
    model, report = AutoModelForImageTextToText.from_pretrained(
        output, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert model.config.text_config.model_type == "streamline"
    ids = torch.randint(3, 80, (2, 17))
    view = load_model(output, device="cpu")
    assert torch.equal(logits(view, ids), logits(model.eval(), ids))
    seen, image = image_inputs("mistral3")
    assert logits(model, seen, **image).isfinite().all()


@pytest.mark.parametrize(
    ("model_type", "recipe", "named"),
    [("gemma3", "streamline_ffn", "gemma3_text"), ("mistral3", "slicegpt", "images")],
)
def test_what_the_folder_cannot_hold_is_refused_before_any_work(
    model_type: str,
    recipe: str,
    named: str,
    model_of: Callable[[str], tuple[Path, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = model_of(model_type)
    monkeypatch.setattr(CheckpointReader, "in_file", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ArchitectureError, match=named):
        compress(folder, load_recipe(recipe), tmp_path / "out")


def test_the_config_alone_tells_the_text_model(
    model_of: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = model_of("gemma3")
    shutil.copy(folder / "config.json", tmp_path)
    assert load_config(tmp_path).model_type == "gemma3_text"


def test_a_head_that_recovery_unties_is_untied_in_the_whole_model(
    model_of: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = model_of("gemma3")
    recipe = load_recipe("last_layers_partial", {
        "n_layers": 2, "recovery.last_layers": 1, "recovery.head": "untied",
        "recovery.training.min_steps": 2,
        "recovery.training.epochs": 1, "recovery.training.data.samples": 8,
        "recovery.training.data.source": str(folder / "calibration.jsonl"),
        "recovery.training.data.sequence_length": 16, "recovery.training.batch_size": 8,
        "recovery.training.warmup_steps": 0,
    })  # fmt: skip
    output = compress(folder, recipe, tmp_path / "out", progress=False)
    model, report = AutoModelForImageTextToText.from_pretrained(output, output_loading_info=True)
    assert not any(report.values())
    embeddings = model.get_input_embeddings().weight
    assert not torch.equal(model.lm_head.weight, embeddings)
    stored = load_file(output / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored["language_model.lm_head.weight"])


@pytest.mark.parametrize("model_type", ["gemma3", "llama4", "mistral3", "qwen2_5_vl", "qwen3_vl"])
def test_the_stock_harness_scores_the_pruned_folder_as_ours_does(
    model_type: str, model_of: Callable[[str], tuple[Path, Any]], tmp_path: Path, choice_task: Any
) -> None:
    folder, _ = model_of(model_type)
    output = middle_removed(folder, tmp_path / "out")
    rows = [
        {"question": f"w{i} w{i + 1}", "choices": [f"w{3 * i}", f"w{5 * i} w7"], "gold": i % 2}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.yaml").write_text(choice_task("toy", tmp_path / "rows.jsonl"))
    model = AutoModelForImageTextToText.from_pretrained(output, dtype=torch.float32)
    stock = HFLM(model, tokenizer=load_tokenizer(output), backend="causal", device="cpu")
    ours = StreamlineLM(str(output), device="cpu", dtype="float32")
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    scores = []
    for lm in (stock, ours):
        result = simple_evaluate(lm, tasks=["toy"], task_manager=tasks, bootstrap_iters=0)
        samples = sorted(result["samples"]["toy"], key=lambda sample: sample["doc_id"])
        scores.append([float(r[0][0]) for sample in samples for r in sample["resps"]])
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """As Qwen2-VL is published: the text model's entries stand at the top level."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for key in ("model_type", "layer_types"):
        text.pop(key)
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    return {**text, **config, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def test_a_flat_config_stays_flat(
    model_of: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    source, dense = model_of("qwen2_5_vl")
    folder = shutil.copytree(source, tmp_path / "flat")
    config = flat(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    ids = torch.randint(3, 80, (2, 17))
    assert torch.equal(logits(load_model(folder, device="cpu"), ids), logits(dense, ids))
    wrapper = CheckpointReader(folder).wrapper
    shorter = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    assert wrapper.written({**wrapper.text_json, **shorter}) == {**config, **shorter}


def test_the_head_is_the_wrappers_own(tmp_path: Path) -> None:
    """Llava has a plain head; Granite's own would divide the logits."""
    text = {**TEXT, "model_type": "granite", "logits_scaling": 8.0}
    dense = build("llava", tmp_path, text_config=text)
    ids = torch.randint(3, 80, (2, 17))
    assert torch.equal(logits(load_model(tmp_path, device="cpu"), ids), logits(dense, ids))
    wrapper = CheckpointReader(tmp_path).wrapper
    assert wrapper.written(wrapper.text_json) == wrapper.config


def test_removing_a_layer_that_image_features_are_added_behind_is_said(
    model_of: Callable[[str], tuple[Path, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = model_of("qwen3_vl")
    wrapper = CheckpointReader(folder).wrapper
    first, second, third = (f"model.layers.{layer}.a" for layer in range(3))
    with caplog.at_level(logging.WARNING):
        wrapper.warn_of_taps({first: first, second: second}, "model.layers")
        assert not caplog.records
        wrapper.warn_of_taps({first: first, second: third}, "model.layers")
    assert "deepstack" in caplog.text


def test_quantisation_settings_have_the_names_of_either_side(
    model_of: Callable[[str], tuple[Path, Any]],
) -> None:
    folder, _ = model_of("mistral3")
    wrapper = CheckpointReader(folder).wrapper
    settings = {
        "ignore": [
            "language_model.model.layers.3.mlp",
            "vision_tower.transformer.layers.1",
            "re:.*x",
        ],
        "per_module": {"language_model.lm_head": 8, "multi_modal_projector": 4},
    }
    text = wrapper.text_settings(settings)
    assert text == {"ignore": ["model.layers.3.mlp", "re:.*x"], "per_module": {"lm_head": 8}}
    text["ignore"][0] = "model.layers.1.mlp"
    assert wrapper.outer_settings(text, settings) == {
        "ignore": [
            "language_model.model.layers.1.mlp",
            "re:.*x",
            "vision_tower.transformer.layers.1",
        ],
        "per_module": settings["per_module"],
    }


@pytest.mark.parametrize("model_type", ["gemma4_assistant", "gemma4_unified_assistant"])
def test_a_model_that_drafts_for_another_one_is_refused(model_type: str, tmp_path: Path) -> None:
    text = {"model_type": model_type.replace("assistant", "text"), "num_hidden_layers": 6,
            "num_kv_shared_layers": 6, "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0}  # fmt: skip
    config = CONFIG_MAPPING[model_type](text_config=text)
    config.save_pretrained(tmp_path)
    with pytest.raises(ArchitectureError, match=f"'{model_type}'.*drafts.*another model"):
        load_config(tmp_path)


def test_a_text_model_whose_class_is_listed_under_its_wrapper(tmp_path: Path) -> None:
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    CONFIG_MAPPING["emu3"](text_config=text).save_pretrained(tmp_path)
    names = [
        "text_model.model.layers.0.mlp.up_proj.weight",
        "text_model.lm_head.weight",
        "vqmodel.x",
    ]
    found = wrapper_of(tmp_path, json.loads((tmp_path / "config.json").read_text()), names)
    assert found is not None and found.outer == ("vqmodel.x",)
    assert found.stored == {name.removeprefix("text_model."): name for name in names[:2]}
    assert architecture_of(found.text_config()).layers == "model.layers"


def test_features_tied_to_text_layers_by_index_are_refused(
    model_of: Callable[[str], tuple[Path, Any]],
) -> None:
    folder, _ = model_of("mistral3")
    reader = CheckpointReader(folder)
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ArchitectureError, match="deepstack_layer_map"):
        wrapper_of(folder, {**config, "deepstack_layer_map": [[0, 1]]}, reader.files)


def test_a_text_model_that_attends_to_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(MllamaConfig().to_json_string(use_diff=False))
    with pytest.raises(ArchitectureError, match="cross_attention_layers"):
        load_config(tmp_path)
