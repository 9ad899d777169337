"""Surgery on files gives the model that surgery in memory gives, byte by byte."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from surgery_in_memory import keep_layers
from transformers import AutoModelForCausalLM

from streamline_bench.core.architecture import ARCHITECTURES, architecture_of
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import (
    LazyTensors,
    compose,
    copied_files,
    layer_dtype,
    layer_names,
    layers_prefix,
)
from streamline_bench.core.surgery import pruned_config
from streamline_bench.errors import CheckpointError, OutputError

KEEP = [0, 2, 3, 5]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def prune_on_disk(source: Path, output: Path, config: Any, keep: list[int], **options: Any) -> None:
    reader = CheckpointReader(source)
    new = json.loads(pruned_config(config, keep).to_json_string())
    names = layer_names(reader, architecture_of(config), keep)
    output.mkdir()
    compose(reader, output, config=new, names=names, progress=False, **options)


def assert_loads_as(output: Path, expected: torch.Tensor, ids: torch.Tensor) -> None:
    loaded, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert {key: found for key, found in report.items() if found} == {}
    torch.testing.assert_close(logits(loaded.eval(), ids), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shard_size", ["20KB", "10GB"])
def test_files_equal_memory(
    variant: str,
    shard_size: str,
    random_model: Callable[..., Any],
    token_ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    model = random_model(variant)
    model.save_pretrained(tmp_path / "dense", max_shard_size=shard_size)
    config = model.config
    keep_layers(model, KEEP)
    prune_on_disk(tmp_path / "dense", tmp_path / "out", config, KEEP)
    assert_loads_as(tmp_path / "out", logits(model, token_ids), token_ids)


@pytest.mark.parametrize("variant_name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_fused_expert_tensors(
    variant_name: str, random_model: Callable[..., Any], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    """Experts under the names of the model in memory, beside the hub's one-per-expert names."""
    model = random_model(variant_name)
    model.config.save_pretrained(tmp_path / "dense")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    save_file(state, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    config = model.config
    keep_layers(model, KEEP)
    prune_on_disk(tmp_path / "dense", tmp_path / "out", config, KEEP)
    assert_loads_as(tmp_path / "out", logits(model, token_ids), token_ids)


@pytest.mark.parametrize("variant_name", ["gpt2", "opt", "gemma2", "llama-tied"])
def test_checkpoints_saved_without_the_head(
    variant_name: str, random_model: Callable[..., Any], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    """The hub's gpt2 has ``h.0.ln_1.weight`` where the causal LM has ``transformer.h.0...``."""
    model = random_model(variant_name)
    model.base_model.save_pretrained(tmp_path / "dense")
    row = architecture_of(model.config)
    reader = CheckpointReader(tmp_path / "dense")
    assert layers_prefix(reader, row) == row.layers.removeprefix(f"{row.base}.")
    config = model.config
    keep_layers(model, KEEP)
    prune_on_disk(tmp_path / "dense", tmp_path / "out", config, KEEP)
    assert_loads_as(tmp_path / "out", logits(model, token_ids), token_ids)


def test_tied_weights_stored_twice_stay_equal(
    random_model: Callable[..., Any], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    model = random_model("llama-tied")
    model.config.save_pretrained(tmp_path / "dense")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= state.keys()
    save_file(state, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    config = model.config
    keep_layers(model, KEEP)
    prune_on_disk(tmp_path / "dense", tmp_path / "out", config, KEEP)
    assert_loads_as(tmp_path / "out", logits(model, token_ids), token_ids)


@pytest.fixture
def dense(random_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A six-layer Llama in bfloat16 with float32 norms, in shards of about 20 KB."""
    model = random_model("llama").to(torch.bfloat16)
    for name, module in model.named_modules():
        if "norm" in name:
            module.to(torch.float32)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    return tmp_path / "dense"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors as the safetensors library reads them."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


@pytest.mark.parametrize("max_shard_bytes", [1, 9_000, 30_000, 5e9])
def test_bytes_are_the_source_bytes_however_sharded(
    dense: Path, tmp_path: Path, max_shard_bytes: float
) -> None:
    reader = CheckpointReader(dense)
    names = layer_names(reader, ARCHITECTURES["llama"], [1, 4])
    output = tmp_path / "out"
    output.mkdir()
    compose(reader, output, config=reader.config, names=names, max_shard_bytes=max_shard_bytes)
    source, result = stored(dense), stored(output)
    assert result.keys() == names.keys()
    for new, old in names.items():
        assert result[new].dtype == source[old].dtype
        assert torch.equal(result[new], source[old])
    assert {tensor.dtype for tensor in result.values()} == {torch.float32, torch.bfloat16}
    check_layout(output, max_shard_bytes)


def check_layout(output: Path, max_shard_bytes: float) -> None:
    shards = sorted(output.glob("*.safetensors"))
    index = output / "model.safetensors.index.json"
    if len(shards) == 1:
        assert [shard.name for shard in shards] == ["model.safetensors"]
        assert not index.exists()
    else:
        weight_map = json.loads(index.read_text())["weight_map"]
        assert set(weight_map.values()) == {shard.name for shard in shards}
        total = len(shards)
        assert shards[0].name == f"model-00001-of-{total:05d}.safetensors"
    for path in shards:
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        assert length % 8 == 0
        # Who may read the other files may read the weights.
        assert path.stat().st_mode == (output / "config.json").stat().st_mode
        with safe_open(path, "pt") as file:
            count = len(list(file.keys()))
            assert file.metadata() == {"format": "pt"}
        assert len(raw) - 8 - length <= max_shard_bytes or count == 1


def test_tensors_start_at_multiples_of_their_element_size(tmp_path: Path) -> None:
    """Odd-sized bytes before wide elements would make readers that map the file fail."""
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tensors = {
        "model.layers.0.a": torch.arange(3, dtype=torch.uint8),
        "model.layers.0.b": torch.randn(5, dtype=torch.float64),
        "model.layers.0.c": torch.randn(3).to(torch.bfloat16),
        "model.layers.0.d": torch.randn(7).to(torch.float8_e4m3fn),
        "model.layers.0.e": torch.tensor(2.5),
        "model.layers.0.f": torch.empty(0, 4),
    }
    save_file(tensors, folder / "model.safetensors")
    reader = CheckpointReader(folder)
    output = tmp_path / "out"
    output.mkdir()
    extra = {
        "x": torch.tensor([True, False, True]),
        "y": torch.randn(2, 3).t(),
        "z": torch.ones(()),
    }
    names = {name: name for name in reversed(reader.names)}
    compose(reader, output, config={"model_type": "llama"}, names=names, extra=extra)
    result = CheckpointReader(output)
    raw = (output / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    for name, expected in {**tensors, **extra}.items():
        assert header[name]["data_offsets"][0] % expected.element_size() == 0
        assert result.entry(name).shape == tuple(expected.shape)
        left, right = result.tensor(name), load_file(output / "model.safetensors")[name]
        assert left.dtype == right.dtype == expected.dtype
        for found in (left, right):
            assert torch.equal(found.float(), expected.float())


def test_one_source_tensor_under_two_names(dense: Path, tmp_path: Path) -> None:
    reader = CheckpointReader(dense)
    old = "model.layers.2.mlp.up_proj.weight"
    output = tmp_path / "out"
    output.mkdir()
    compose(reader, output, config=reader.config, names={"first": old, "second": old})
    result = stored(output)
    assert torch.equal(result["first"], stored(dense)[old])
    assert torch.equal(result["second"], stored(dense)[old])


def test_small_files_go_along_and_others_stay(dense: Path, tmp_path: Path) -> None:
    carried = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE"]
    left = ["README.md", "streamline.json", "pytorch_model.bin", "x.gguf", ".gitattributes"]
    for name in carried + left:
        (dense / name).write_text(name)
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (dense / "original").mkdir()
    (dense / "original" / "params.json").write_text("{}")
    config = {"model_type": "llama", "note": "nëw"}
    output = tmp_path / "out"
    output.mkdir()
    reader = CheckpointReader(dense)
    compose(reader, output, config=config, names={"a": reader.names[0]})
    found = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
    assert found == {
        *carried,
        "additional_chat_templates/tool.jinja",
        "generation_config.json",
        "config.json",
        "model.safetensors",
    }
    assert json.loads((output / "config.json").read_text()) == config
    assert (output / "LICENSE").read_text() == "LICENSE"


def test_links_out_of_the_folder_are_not_followed(dense: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (dense / "vocab.txt").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"vocab\.txt is a link to .*secret"):
        copied_files(dense)


def test_layers_beyond_the_decoder_are_left_out(
    random_model: Callable[..., Any], token_ids: torch.Tensor, tmp_path: Path
) -> None:
    """DeepSeek's checkpoints carry a layer for multi-token prediction behind the last one."""
    model = random_model("deepseek_v3")
    model.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    state = load_file(path)
    added = {n.replace("layers.5.", "layers.6."): t.clone() for n, t in state.items() if ".5." in n}
    save_file({**state, **added, "model.layers.6.eh_proj.weight": torch.ones(2)}, path,
              {"format": "pt"})  # fmt: skip
    config = model.config
    keep_layers(model, KEEP)
    prune_on_disk(tmp_path / "dense", tmp_path / "out", config, KEEP)
    assert not any(re.search(r"layers\.[456]\.", name) for name in stored(tmp_path / "out"))
    assert_loads_as(tmp_path / "out", logits(model, token_ids), token_ids)


def test_missing_layers_and_tensors_are_named(dense: Path, tmp_path: Path) -> None:
    reader = CheckpointReader(dense)
    with pytest.raises(CheckpointError, match="no tensors of layer 6"):
        layer_names(reader, ARCHITECTURES["llama"], [0, 6])
    with pytest.raises(CheckpointError, match=r"no tensors named 'transformer\.h\.0"):
        layer_names(reader, ARCHITECTURES["gpt2"], [0])
    with pytest.raises(CheckpointError, match="no tensor 'nowhere'"):
        compose(reader, tmp_path, config={}, names={"a": "nowhere"})
    extra = {"a": torch.ones(1)}
    with pytest.raises(CheckpointError, match="'a' is both copied and given anew"):
        compose(reader, tmp_path, config={}, names={"a": reader.names[0]}, extra=extra)


def test_a_source_that_shrinks_meanwhile_is_noticed(dense: Path, tmp_path: Path) -> None:
    reader = CheckpointReader(dense)
    last = reader.entry(reader.names[-1])
    reader.tensor(last.name)
    os.truncate(last.shard, last.shard.stat().st_size - 1)
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(CheckpointError, match=rf"{last.shard.name} changed"):
        compose(reader, output, config={}, names={"a": last.name})


def test_an_output_that_cannot_be_written(dense: Path, tmp_path: Path) -> None:
    reader = CheckpointReader(dense)
    with pytest.raises(OutputError, match="No such file or directory"):
        compose(reader, tmp_path / "absent", config={}, names={"a": reader.names[0]})


def test_tensors_that_share_memory_are_each_written(dense: Path, tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    extra = {"whole": whole, "part": whole[2:4], "again": whole, "turned": whole.t()}
    compose(CheckpointReader(dense), tmp_path, config={}, names={}, extra=extra)
    result = stored(tmp_path)
    assert result.keys() == extra.keys()
    assert all(torch.equal(result[name], extra[name]) for name in extra)


def test_a_shard_at_a_time_is_held(dense: Path, tmp_path: Path) -> None:
    """Tensors that are made when asked for are let go with the shard they are in."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def make(name: str) -> torch.Tensor:
        alive.append(sum(reference() is not None for reference in made))
        tensor = torch.ones(1000)
        made.append(weakref.ref(tensor))
        return tensor

    extra = LazyTensors([f"t{i:02d}" for i in range(12)], make)
    compose(
        CheckpointReader(dense), tmp_path, config={}, names={}, extra=extra, max_shard_bytes=12_000
    )
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert len(made) == 12 and max(alive) <= 3


PRUNE = """
import sys
from pathlib import Path
import torch
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import compose

source, output = map(Path, sys.argv[1:])
reader = CheckpointReader(source)
print("ready", flush=True)
sys.stdin.readline()
names = {n: n for n in reader.names if ".1." not in n}
compose(reader, output, config=reader.config, names=names, progress=False)
print("done", flush=True)
sys.stdin.readline()
"""


def sparse_checkpoint(folder: Path, layers: int, bytes_per_layer: int) -> None:
    """A checkpoint of zeros that takes no space on disk where files may have holes."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    header = {
        f"model.layers.{i}.w": {
            "dtype": "BF16",
            "shape": [bytes_per_layer // 2],
            "data_offsets": [i * bytes_per_layer, (i + 1) * bytes_per_layer],
        }
        for i in range(layers)
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path = folder / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + layers * bytes_per_layer)


def anonymous_memory(process: int) -> int:
    """KiB that a process holds besides mapped files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="no /proc, where a process's memory is read"
)
def test_memory_does_not_follow_the_size_of_the_model(tmp_path: Path) -> None:
    sparse_checkpoint(tmp_path / "source", layers=3, bytes_per_layer=100 * 2**20)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", PRUNE, str(tmp_path / "source"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        before = anonymous_memory(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        peak = before
        while not select.select([process.stdout], [], [], 0.002)[0]:
            peak = max(peak, anonymous_memory(process.pid))
        assert process.stdout.readline() == b"done\n"
    assert process.returncode == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 200 * 2**20
    assert peak - before < 40 * 1024


@pytest.mark.parametrize(
    ("matrices", "norms", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float64, torch.float32),
    ],
)
def test_the_dtype_of_a_layer_is_that_of_its_matrices(
    matrices: torch.dtype,
    norms: torch.dtype,
    expected: torch.dtype,
    random_model: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model = random_model("llama")
    # Of one layer only, and the norm lies first in the file.
    for name, parameter in model.model.layers[2].named_parameters():
        parameter.data = parameter.data.to(norms if "norm" in name else matrices)
    model.save_pretrained(tmp_path)
    reader = CheckpointReader(tmp_path)
    row = architecture_of(model.config)
    assert layer_dtype(reader, row, 2) == expected
    assert layer_dtype(reader, row, 1) == torch.float32
