"""Opening model folders, good and bad."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_models import tiny_model
from safetensors.torch import load_file, save_file

from streamline_bench.core.checkpoint.folder import resolve_pretrained
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import (
    ArchitectureError,
    CheckpointError,
    NumericsError,
)
from streamline_bench.modeling.loading import SourceModel


def test_tensors_equal_those_of_the_safetensors_library(sharded: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for path in sharded.glob("*.safetensors"):
        expected.update(load_file(path))
    reader = CheckpointReader(sharded)
    assert set(reader.names) == set(expected)
    assert len({reader.entry(name).shard for name in reader.names}) > 2
    for name in reader.names:
        found = reader.tensor(name)
        assert found.dtype == expected[name].dtype
        assert torch.equal(found, expected[name])
        assert reader.entry(name).shape == tuple(expected[name].shape)


def test_of_two_sets_of_weights_the_single_file_is_read_and_the_other_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(folder / "model.safetensors")
    part = "model-00001-of-00001.safetensors"
    save_file({name: value + 1 for name, value in weights.items()}, folder / part)
    index = {"weight_map": dict.fromkeys(weights, part)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    reader = CheckpointReader(folder)
    assert torch.equal(reader.tensor("model.norm.weight"), weights["model.norm.weight"])
    (record,) = caplog.records
    assert "model.safetensors.index.json" in record.getMessage()
    assert "left out" in record.getMessage()


def test_two_sets_of_weights_that_differ_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys([*weights, "model.layers.99.x"], "other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.layers\.99\.x.*remove"):
        CheckpointReader(folder)


def test_a_tensor_is_a_view_that_cannot_change_the_file(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    reader = CheckpointReader(folder)
    name = "model.norm.weight"
    assert reader.tensor(name).data_ptr() == reader.tensor(name).data_ptr()
    reader.tensor(name).fill_(7)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_misaligned_tensor_is_read_right(folder: Path) -> None:
    values = torch.randn(4)
    data = b"\0" + bytes(values.numpy().tobytes())
    header = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [4], "data_offsets": [1, 17]},
    }
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    assert torch.equal(CheckpointReader(folder).tensor("x"), values)


@pytest.mark.parametrize("variant_name", ["llama", "gpt2", "gpt_neox", "deepseek_v3", "opt"])
def test_parameters_are_counted_as_transformers_counts_them(
    variant_name: str, random_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = random_model(variant_name)
    model.save_pretrained(tmp_path)
    assert CheckpointReader(tmp_path).num_parameters == model.num_parameters()


def test_tied_and_buffer_tensors_are_not_parameters(
    random_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = random_model("gpt2")
    model.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    assert "lm_head.weight" in state
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert CheckpointReader(tmp_path).num_parameters == model.num_parameters()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_masks_of_old_exports_are_neither_parameters_nor_codes(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """GPT-J was published with its causal masks; transformers has them no more."""
    model = tiny_model("gptj", 2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=dtype)
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reader = CheckpointReader(tmp_path)
    assert reader.quantisation is None
    assert reader.num_parameters == sum(each.numel() for each in model.parameters())


def test_layers_of_a_tower_are_counted_whatever_their_number(folder: Path) -> None:
    """Layers beyond the config's depth are those of the decoder, by the start of their names."""
    state, before = load_file(folder / "model.safetensors"), CheckpointReader(folder)
    state["model.image_embed.encoder.layers.17.mlp.weight"] = torch.ones(3, 5)
    state["model.layers.17.mlp.weight"] = torch.ones(2)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    reader = CheckpointReader(folder)
    assert reader.num_parameters == before.num_parameters + 15
    assert reader.extra_names == ("model.layers.17.mlp.weight",)


def test_unknown_tensors_are_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.nowhere'"):
        CheckpointReader(folder).entry("model.nowhere")


def test_local_folder_is_taken_as_it_is(folder: Path) -> None:
    assert resolve_pretrained(folder) == folder
    assert resolve_pretrained(str(folder)) == folder


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        resolve_pretrained(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\xff"])
def test_folder_with_a_damaged_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        CheckpointReader(folder)


@pytest.mark.parametrize("inside", [False, True])
def test_a_depth_that_would_fill_the_memory_is_refused(folder: Path, inside: bool) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 10**9
    config = {"model_type": "llava", "text_config": config} if inside else config
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers=1000000000.*number of layers"):
        CheckpointReader(folder)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "a/b/c"])
def test_missing_folder(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} does not exist"):
        resolve_pretrained(name)


@pytest.mark.parametrize("name", ["nobody/nothing-at-all", "no such name"])
def test_unknown_hub_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=f"'{name}'.*local folder"):
        resolve_pretrained(name)


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/model"])
def test_a_name_that_cannot_be_looked_for(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{name}'.*correct its name"):
        resolve_pretrained(name)


def test_pickles_are_refused_and_the_converting_command_works(
    folder: Path, random_model: Callable[..., Any]
) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickles only") as caught:
        resolve_pretrained(folder)
    command = str(caught.value).split("convert them with: ")[1]
    assert command.startswith('python -c "') and command.endswith('"')
    code = command.removeprefix('python -c "').removesuffix('"')
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    reader = CheckpointReader(resolve_pretrained(folder))
    assert all(torch.equal(reader.tensor(name), state[name]) for name in state)


def test_adapters_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"PEFT adapter.*merge"):
        resolve_pretrained(folder)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        resolve_pretrained(folder)


@pytest.mark.parametrize("left", [0, 4, 9, 200, -1])
def test_a_truncated_shard_is_named_with_its_size(folder: Path, left: int) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, left if left >= 0 else size - 1)
    found = left if left >= 0 else size - 1
    with pytest.raises(CheckpointError, match=rf"model\.safetensors \({found} bytes\).*truncated"):
        CheckpointReader(folder)


def test_missing_shard(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"{victim.name} is missing"):
        CheckpointReader(sharded)


@pytest.mark.parametrize(
    "where", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "C:\\x", 3]
)
def test_index_that_leaves_the_folder(sharded: Path, where: Any) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"lm_head.weight": where}))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' .*not a file"):
        CheckpointReader(sharded)


def test_link_that_leaves_the_folder(sharded: Path, tmp_path: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.rename(tmp_path / "elsewhere")
    victim.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"is a link to .*elsewhere, outside"):
        CheckpointReader(sharded)


def test_links_of_the_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in folder.iterdir():
        file.rename(repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert CheckpointReader(snapshot).num_parameters > 0


def test_index_that_promises_tensors_no_shard_holds(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"x": weight_map["lm_head.weight"]}))
    with pytest.raises(CheckpointError, match="lacks tensor 'x'"):
        CheckpointReader(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    with pytest.raises(CheckpointError, match=f"'{name}'.*another shard"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_damaged_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_named(
    folder: Path, value: float, dtype: torch.dtype
) -> None:
    path = folder / "model.safetensors"
    state = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(state, path, {"format": "pt"})
    CheckpointReader(folder).check_finite()
    state["model.layers.3.mlp.up_proj.weight"][-1, -1] = value
    save_file(state, path, {"format": "pt"})
    with pytest.raises(NumericsError, match=r"'model\.layers\.3\.mlp\.up_proj\.weight'"):
        CheckpointReader(folder).check_finite()


def test_finite_check_reads_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamline_bench.core.checkpoint.shard._PIECE", 16)
    path = folder / "model.safetensors"
    state = load_file(path)
    state["float8"] = torch.full((100,), 2.0).to(torch.float8_e5m2)
    state["whole"] = torch.full((3,), -1)  # all bits set: NaN, were it read as a float
    save_file(state, path)
    CheckpointReader(folder).check_finite()
    state["float8"] = torch.full((100,), float("nan")).to(torch.float8_e5m2)
    save_file(state, path)
    with pytest.raises(NumericsError, match="'float8'"):
        CheckpointReader(folder).check_finite()


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "said"), [("model-Q4_K_M.gguf", "GGUF"), ("consolidated.safetensors", "consolidated")]
)
def test_a_folder_of_another_kind_is_named_for_what_it_is(
    tmp_path: Path, name: str, said: str
) -> None:
    (tmp_path / name).touch()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{said}.*safetensors"):
            resolve_pretrained(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')


def test_a_check_of_the_config_comes_before_any_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that is not supported: nothing but its config is downloaded."""
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        (tmp_path / "config.json").write_text('{"model_type": "t5"}')
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ArchitectureError, match="t5"):
        SourceModel.find("owner/name")
    assert asked == [["config.json"]]
    with pytest.raises(ArchitectureError, match="t5"):
        SourceModel.find(tmp_path)
