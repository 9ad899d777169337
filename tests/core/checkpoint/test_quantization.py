"""Quantised checkpoints: recognised, refused by name where they would be misread, copied whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamline_bench.compression import compress, load_recipe
from streamline_bench.core.checkpoint.quantization import renumbered
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import ArchitectureError, CheckpointError, MissingDependencyError
from streamline_bench.modeling.loading import load_config, load_model, require_package

EXEMPT = (0, 5)
NAMES = [f"model.layers.{layer}.mlp.up_proj" for layer in EXEMPT]


def _say(folder: Path, settings: dict[str, Any]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def plain(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model("llama")


@pytest.fixture
def fp8(plain: Path) -> Path:
    """Codes with a scale per block of 16, in all layers but the first and the last."""
    stored = {}
    for name, value in load_file(plain / "model.safetensors").items():
        inside = ".layers." in name and value.dim() == 2
        if inside and int(name.split(".")[2]) not in EXEMPT:
            scale = value.abs().max() / 448
            stored[name] = (value / scale).to(torch.float8_e4m3fn)
            blocks = [(size + 15) // 16 for size in value.shape]
            stored[f"{name}_scale_inv"] = torch.full(blocks, float(scale))
        else:
            stored[name] = value
    save_file(stored, plain / "model.safetensors", metadata={"format": "pt"})
    return _say(plain, {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", *NAMES]})


def test_an_fp8_checkpoint_is_recognised_and_counted(
    make_tiny_model: Callable[..., Path], fp8: Path
) -> None:
    found = CheckpointReader(fp8).quantisation
    assert found is not None
    assert (found.method, found.bits, found.stored) == ("fp8", 8, True)
    dense = CheckpointReader(make_tiny_model("llama"))
    assert dense.quantisation is None
    assert CheckpointReader(fp8).num_parameters == dense.num_parameters
    # Without a word in its config, the tensors tell.
    config = json.loads((fp8 / "config.json").read_text())
    del config["quantization_config"]
    (fp8 / "config.json").write_text(json.dumps(config))
    found = CheckpointReader(fp8).quantisation
    assert found is not None and found.method == "float8"


@pytest.mark.parametrize(
    ("settings", "bits", "dtype", "shape", "parameters"),
    [
        ({"quant_method": "gptq", "bits": 4}, 4, torch.int32, (4, 8), 256),
        ({"quant_method": "gptq", "bits": 3}, 3, torch.int32, (3, 8), 256),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4, torch.uint8, (32, 1), 64),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8, torch.int8, (4, 8), 32),
    ],
)
def test_packed_codes_are_counted_as_the_weights_they_hold(
    plain: Path,
    settings: dict[str, Any],
    bits: int,
    dtype: torch.dtype,
    shape: tuple[int, int],
    parameters: int,
) -> None:
    weights = load_file(plain / "model.safetensors")
    gone = weights.pop("model.layers.0.mlp.up_proj.weight").numel()
    before = CheckpointReader(plain).num_parameters
    prefix = "model.layers.0.mlp.up_proj."
    packed = "qweight" if settings["quant_method"] == "gptq" else "weight"
    weights[prefix + packed] = torch.zeros(shape, dtype=dtype)
    for name in ("qzeros", "scales", "g_idx", "SCB", "weight.absmax", "weight.quant_map"):
        weights[prefix + name] = torch.zeros(4, 4)
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    reader = CheckpointReader(_say(plain, settings))
    found = reader.quantisation
    assert found is not None and found.bits == bits
    assert reader.num_parameters == before - gone + parameters


def test_whatever_reads_codes_of_an_unknown_format_refuses(
    plain: Path, tmp_path: Path, text_file: Path
) -> None:
    weights = load_file(plain / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.codes"] = torch.zeros(4, 4, dtype=torch.int16)
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    _say(plain, {"quant_method": "aqlm"})

    def compressed(recipe: str) -> Any:
        given = {"n_layers": 1, "calibration": str(text_file)}
        return compress(plain, load_recipe(recipe, given), tmp_path / recipe, progress=False)

    attempts: list[Callable[[], Any]] = [
        lambda: load_model(plain, device="cpu"),
        lambda: load_model(plain, device="cpu", streamed=True),
        lambda: CheckpointReader(plain).tensor("lm_head.weight"),
        *(
            lambda r=r: compressed(r)
            for r in ("magnitude_l2", "streamline_none", "last_layers_lora")
        ),
    ]
    for attempt in attempts:
        with pytest.raises(CheckpointError, match=r"quantised \(aqlm\).*up_proj.codes"):
            attempt()
    assert compressed("last_layers").is_dir()


def test_dropping_layers_by_place_renumbers_the_exceptions(fp8: Path, tmp_path: Path) -> None:
    (fp8 / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", *NAMES]}})
    )
    recipe = load_recipe("first_layers", {"n_layers": 1})
    out = compress(fp8, recipe, tmp_path / "out", progress=False)
    stored = load_file(out / "model.safetensors")
    whole = [i for i in range(5) if stored[f"model.layers.{i}.mlp.up_proj.weight"].itemsize == 4]
    expected = ["lm_head", *(f"model.layers.{i}.mlp.up_proj" for i in whole)]
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"] == expected
    beside = json.loads((out / "hf_quant_config.json").read_text())
    assert beside["quantization"]["exclude_modules"] == expected


def test_renumbering_reaches_keys_lists_and_patterns() -> None:
    settings = {
        "ignore": ["lm_head", "re:.*gate$", "model.layers.1.mlp", "model.layers.3"],
        "dynamic": {r"-:model\.layers\.1\.mlp": {}, r"+:model\.layers\.3\.mlp": {"bits": 8}},
        "config_groups": {"group_0": {"targets": ["model.layers.2.mlp.up_proj"], "bits": 4}},
        "skip": ["transformer.h.3.attn", "model.layers.33.mlp"],
    }
    assert renumbered(settings, [0, 2, 3]) == {
        "ignore": ["lm_head", "re:.*gate$", "model.layers.2"],
        "dynamic": {r"+:model\.layers\.2\.mlp": {"bits": 8}},
        "config_groups": {"group_0": {"targets": ["model.layers.1.mlp.up_proj"], "bits": 4}},
        "skip": ["transformer.h.2.attn"],
    }
    for name in (r"re:model\.layers\.(?=1)\.mlp", "model.layers.1*", "model.layers.[12].mlp"):
        with pytest.raises(ArchitectureError, match="several layers"):
            renumbered([name], [0])


@pytest.mark.parametrize(
    "pattern",
    [
        r"re:model\.layers\.\d+\.mlp.*", r"re:.*layers\.[0-9]+\.mlp", r"re:.*\.layers\..*\.mlp\.up",
        r"re:model.layers.*up_proj$", r"re:.*mlp.*", r"re:model.layers.1.*", r"re:.*layers.1",
        r"re:model\.layers\.1\..*", r"re:model.layers.1.mlp.*", r"re:model\.layers\.(0|1|12)\.mlp",
        r"re:model.layers.(?:3|4).*", r"re:model\.layers\.[2-4]\.",
        r"re:model\.layers\.1[0-2]\.mlp",
        r"re:model\.layers\.1\d.*", r"re:.*layers\.7$", r"re:model\.layers\.\d\.mlp\.up_proj",
        r"re:model.layers.1.+up_proj",
    ],
)  # fmt: skip
def test_a_pattern_names_the_same_layers_after_some_are_gone(pattern: str) -> None:
    """Against what matches: the names of 13 layers before, those of 7 kept ones after."""
    names = ["model.layers.{}", "model.layers.{}.mlp.up_proj", "model.layers.{}.self_attn.q_proj"]
    keep = [0, 1, 3, 7, 10, 11, 12]
    new = renumbered([pattern], keep)
    for after, before in enumerate(keep):
        for name in names[1:] if pattern.endswith((".*", ".+up_proj")) else names:
            said = any(re.match(each.removeprefix("re:"), name.format(after)) for each in new)
            there = re.match(pattern.removeprefix("re:"), name.format(before)) is not None
            assert said == there, (new, name, before)


@pytest.mark.parametrize("method", ["mxfp4", "modelopt", "of_tomorrow"])
def test_settings_that_transformers_ignores_are_ignored_and_said(
    plain: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = load_model(plain, device="cpu").state_dict()
    _say(plain, {"quant_method": method})
    with caplog.at_level("WARNING", "streamline_bench"):
        after = load_model(plain, device="cpu").state_dict()
    assert method in caplog.text
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not hasattr(load_config(plain), "quantization_config")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_settings_over_plain_weights_are_refused(plain: Path, method: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{method}'.*not quantised"):
        load_model(_say(plain, {"quant_method": method, "bits": 4}), device="cpu")


def test_codes_that_transformers_would_take_for_weights_are_refused(fp8: Path) -> None:
    with pytest.raises(CheckpointError, match="modelopt"):
        require_package(_say(fp8, {"quant_method": "modelopt", "quant_algo": "FP8"}))


def test_a_missing_package_is_named_with_its_pip_line(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install gptqmodel"):
        require_package(_say(plain, {"quant_method": "gptq", "bits": 4}))
    require_package("owner/name")


@pytest.mark.parametrize("said", [True, False])
def test_the_packed_weights_of_mlx_are_recognised(plain: Path, said: bool) -> None:
    """Eight codes of four bits in an unsigned integer, a scale and a bias for each 32 of them."""
    count = CheckpointReader(plain).num_parameters
    stored: dict[str, torch.Tensor] = {}
    for name, value in load_file(plain / "model.safetensors").items():
        if value.dim() == 2:
            rows, columns = value.shape
            stored[name] = torch.zeros(rows, columns // 8, dtype=torch.uint32)
            for part in ("scales", "biases"):
                stored[f"{name.removesuffix('weight')}{part}"] = torch.ones(rows, columns // 32)
        else:
            stored[name] = value
    save_file(stored, plain / "model.safetensors", metadata={"format": "pt"})
    if said:
        config = json.loads((plain / "config.json").read_text())
        config["quantization"] = {"group_size": 32, "bits": 4}
        (plain / "config.json").write_text(json.dumps(config))
    reader = CheckpointReader(plain)
    assert reader.quantisation is not None
    assert (reader.quantisation.method, reader.quantisation.bits) == ("mlx", 4)
    assert reader.num_parameters == count
    with pytest.raises(CheckpointError, match="mlx"):
        load_model(plain, device="cpu")
    with pytest.raises(CheckpointError, match="mlx"):
        require_package(plain)


def test_a_weight_of_another_shape_is_named(plain: Path) -> None:
    path, name = plain / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(path)
    weights[name] = weights[name][:7].clone()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}' is stored with shape \[7, "):
        load_model(plain, device="cpu")
