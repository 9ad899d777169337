"""compress() and its cache: whole or nothing, reused by content, exact after a kill."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from surgery_in_memory import keep_layers
from transformers import AutoModelForCausalLM

from streamline_bench.compression import compress, compress_cached
from streamline_bench.compression.pipeline import content_key
from streamline_bench.core.checkpoint.folder import read_manifest, verify_files
from streamline_bench.core.scan import scan
from streamline_bench.errors import CacheError, RecipeError
from streamline_bench.methods.depth import streamline
from streamline_bench.methods.tools import shared_scan
from streamline_bench.modeling import register
from streamline_bench.modeling.loading import SourceModel

IDS = torch.tensor([[1, 5, 9, 40, 22, 7]])
STREAMLINE_KINDS = ("ffn", "swiglu", "ffn_res", "swiglu_res", "linear")


def _logits(folder: Path) -> torch.Tensor:
    register()
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(IDS).logits
    return logits


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_none_equals_surgery_in_memory(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    out = compress(tiny_llama, make_recipe("streamline_none"), tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    removed = manifest.chosen["removed_layers"]
    assert removed == list(range(removed[0], removed[0] + 2))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    keep_layers(model, [i for i in range(6) if i not in removed])
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, _logits(out))


def test_layer_is_a_stock_checkpoint_of_one_trained_layer(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    out = compress(tiny_llama, make_recipe("streamline"), tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.layers_after == 4
    start, removed = manifest.chosen["start"], manifest.chosen["removed_layers"]
    assert len(removed) == 3
    before, after = (load_file(f / "model.safetensors") for f in (tiny_llama, out))
    for name, tensor in after.items():
        parts = name.split(".")
        if parts[1] != "layers":
            assert torch.equal(tensor, before[name])
            continue
        new = int(parts[2])
        old = new if new <= start else new + 2
        parts[2] = str(old)
        same = torch.equal(tensor, before[".".join(parts)])
        assert same is (new != start), name
    stock = "import sys, torch; from transformers import AutoModelForCausalLM as M; "
    stock += (
        f"M.from_pretrained({str(out)!r}); assert 'streamline_bench.modeling' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", stock], check=True)


@pytest.mark.parametrize("kind", STREAMLINE_KINDS)
def test_feed_forward_kinds_reload_and_are_recorded(
    kind: str, tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe("streamline", replacement=kind)
    out = compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    assert _logits(out).isfinite().all()
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.layers_after == 4
    assert manifest.parameters_after == sum(
        tensor.numel() for tensor in load_file(out / "model.safetensors").values()
    )
    assert manifest.sparsity_reached == 1 - manifest.parameters_after / manifest.parameters_before
    verify_files(out, manifest)
    assert {"similarity.json", "training_curve.jsonl", "tokenizer.json"} <= set(manifest.files)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt2", "opt", "gemma3_text"])
def test_layer_of_other_families_is_a_stock_checkpoint(
    model_type: str,
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:
    out = compress(make_tiny_model(model_type), make_recipe(), tmp_path / "out", progress=False)
    assert _logits(out).isfinite().all()


def test_block_at_the_first_layer_needs_leave(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "first.yaml"
    path.write_text("method: streamline\nparameters: {start: 0}\n", encoding="utf-8")
    out = compress(
        tiny_llama,
        make_recipe(str(path), replacement="linear", objective="mse"),
        tmp_path / "out",
        progress=False,
    )
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.chosen["start"] == 0
    assert "model.layers.0.prelude.proj.weight" in load_file(out / "model.safetensors")
    guarded = compress(
        tiny_llama, make_recipe("streamline_none"), tmp_path / "guarded", progress=False
    )
    facts = read_manifest(guarded)
    assert facts is not None
    assert facts.chosen["start"] >= 1


def test_same_recipe_gives_the_same_bytes(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    first, second = (
        compress(tiny_llama, make_recipe(), tmp_path / name, progress=False) for name in "ab"
    )
    assert _digest(first) == _digest(second)
    other = compress(tiny_llama, make_recipe(seed=1), tmp_path / "c", progress=False)
    assert _digest(other) != _digest(first)


def test_cache_reuses_by_content(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path, text_file: Path
) -> None:
    recipe = make_recipe("streamline_none")
    first = compress_cached(tiny_llama, recipe, cache=tmp_path, progress=False)
    again = compress_cached(tiny_llama, recipe, cache=tmp_path, progress=False)
    assert (first.reused, again.reused) == (False, True)
    assert first.path == again.path
    other_size = make_recipe("streamline_none", n_layers=1)
    assert compress_cached(tiny_llama, other_size, cache=tmp_path, progress=False).key != first.key
    changed = tmp_path / "changed.txt"
    changed.write_text(text_file.read_text(encoding="utf-8") + "\n\nw1 w2", encoding="utf-8")
    other_text = make_recipe("streamline_none", calibration=str(changed))
    assert compress_cached(tiny_llama, other_text, cache=tmp_path, progress=False).key != first.key


def test_one_scan_serves_every_recipe_and_size_on_the_same_text(
    tiny_llama: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scans: list[str] = []

    def counted(model: Any, tokens: Any, **options: Any) -> Any:
        scans.append(options["last_state"])
        return scan(model, tokens, **options)

    monkeypatch.setattr(shared_scan, "scan", counted)
    asked = [
        ("streamline_none", 2),
        ("streamline_none", 1),
        ("shortgpt", 2),
        ("replaceme_lstsq", 2),
    ]

    def made(name: str, n: int, cache: Path) -> str:
        recipe = make_recipe(name, n_layers=n)
        return _digest(compress_cached(tiny_llama, recipe, cache=cache, progress=False).path)

    together = [made(name, n, tmp_path / "one") for name, n in asked]
    assert sorted(scans) == sorted(set(scans))  # one for each way to take the last state
    assert together == [made(name, n, tmp_path / f"{name}{n}") for name, n in asked]
    before = len(scans)
    (record, *_) = (tmp_path / "one" / "scans").rglob("*-raw.json")
    record.write_text("{}", encoding="utf-8")
    made("streamline_none", 3, tmp_path / "one")  # a damaged record is made again
    other = tmp_path / "other.txt"
    other.write_text("w9 w9 w8\n\n" + text_file.read_text(encoding="utf-8"), encoding="utf-8")
    recipe = make_recipe("streamline_none", calibration=str(other))
    compress_cached(tiny_llama, recipe, cache=tmp_path / "one", progress=False)
    assert len(scans) == before + 2


@pytest.mark.parametrize(
    ("name", "look", "key", "sizes", "looks"),
    [
        ("sleb", "depth.sleb:skip_losses", "n_layers", (1, 3, 2), 3),
        ("block_pruner", "depth.sublayers:skip_losses", "parameters.sublayers", (2, 1), 2),
        ("joint_drop", "depth.sublayers:sublayer_cosines", "parameters.sublayers", (1, 2), 1),
        ("shortened_llama_ppl", "depth.shortened_llama:skip_losses", "n_layers", (1, 2), 1),
        ("shortened_llama_taylor", "depth.shortened_llama:taylor_scores", "n_layers", (1, 2), 1),
        ("llm_pruner", "width.llm_pruner:gradients_by_layer", "sparsity", (0.1, 0.2), 1),
        ("flap", "width.flap:visit_inputs", "sparsity", (0.1, 0.2), 1),
        ("minitron", "width.minitron:visit_inputs", "sparsity", (0.1, 0.2), 1),
    ],
)
def test_one_look_serves_every_size(
    tiny_llama: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    look: str,
    key: str,
    sizes: tuple[float, ...],
    looks: int,
) -> None:
    """Each size comes out as with a cache of its own, and a damaged record is made anew."""
    module = importlib.import_module(f"streamline_bench.methods.{look.partition(':')[0]}")
    function, calls = look.partition(":")[2], []
    own = getattr(module, function)
    monkeypatch.setattr(
        module, function, lambda *given, **rest: (calls.append(1), own(*given, **rest))[1]
    )

    def made(size: float, cache: Path) -> str:
        recipe = make_recipe(name, **{"n_layers": None, key: size})
        return _digest(compress_cached(tiny_llama, recipe, cache=cache, progress=False).path)

    together = [made(size, tmp_path / "one") for size in sizes]
    assert len(calls) == looks
    assert together == [made(size, tmp_path / f"own{n}") for n, size in enumerate(sizes)]
    assert len(set(together)) == len(sizes)
    kept = (tmp_path / "one" / "scans").rglob("*")
    (record,) = (path for path in kept if path.suffix in (".json", ".safetensors"))
    record.write_bytes(b"{")
    shutil.rmtree(tmp_path / "one" / "compressed")
    assert made(sizes[0], tmp_path / "one") == together[0]


def test_cache_key_follows_the_weights(
    make_tiny_model: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe("streamline_none")
    keys = {
        compress_cached(make_tiny_model(seed=seed), recipe, cache=tmp_path, progress=False).key
        for seed in (1, 2)
    }
    assert len(keys) == 2


def test_another_dtype_or_device_is_another_result(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Where the states are bfloat16, so are the similarities that the block is chosen by."""
    recipe = make_recipe("streamline_none")
    made = {
        dtype: compress_cached(tiny_llama, recipe, cache=tmp_path, dtype=dtype, progress=False)
        for dtype in (None, "bfloat16")
    }
    assert not any(found.reused for found in made.values())
    cosines = [
        json.loads((found.path / "similarity.json").read_text())["cosine"]
        for found in made.values()
    ]
    assert cosines[0] != cosines[1]
    for same in ("float32", "auto", "torch.float32"):
        again = compress_cached(tiny_llama, recipe, cache=tmp_path, dtype=same, progress=False)
        assert again == dataclasses.replace(made[None], reused=True)
    keys = [
        content_key(SourceModel(tiny_llama), recipe, device=name)
        for name in ("cpu", "cuda", "cuda:1")
    ]
    assert keys[0] != keys[1] == keys[2]
    with pytest.raises(RecipeError, match="'bf16'"):
        compress(tiny_llama, recipe, tmp_path / "out", dtype="bf16", progress=False)


@pytest.mark.parametrize(
    "name",
    [
        "vocab.json",
        "merges.txt",
        "spiece.model",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "generation_config.json",
    ],
)
def test_cache_key_follows_every_file_of_the_tokenizer(
    name: str, tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    recipe, keys = make_recipe("streamline_none"), []
    for content in ('{"a": 1}', '{"a": 2}'):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(content, encoding="utf-8")
        keys.append(content_key(SourceModel(model), recipe))
    assert keys[0] != keys[1]
    moved = model.rename(tmp_path / "moved")
    assert content_key(SourceModel(moved), recipe) == keys[1]


def test_two_that_make_the_same_take_turns(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """The first to end removes the folder that both resume from."""
    inside: list[Path] = []
    most: list[int] = []
    choose = streamline.Streamline.compress

    def watched(self: Any, work: Any) -> Any:
        inside.append(work.work)
        most.append(len(inside))
        time.sleep(0.3)
        assert work.work.is_dir()
        result = choose(self, work)
        assert inside == [work.work]
        inside.clear()
        return result

    monkeypatch.setattr(streamline.Streamline, "compress", watched)
    recipe = make_recipe("streamline_none")
    with ThreadPoolExecutor(2) as pool:
        options = {"cache": tmp_path / "cache", "progress": False}
        outs = pool.map(lambda n: compress(tiny_llama, recipe, tmp_path / n, **options), "ab")
        digests = {_digest(out) for out in outs}
    assert (len(digests), most) == (1, [1, 1])
    assert not list((tmp_path / "cache" / "work").iterdir())


def test_errors_of_files_within_a_compression_are_not_blamed_on_the_cache(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> None:
    def fails(self: Any, work: Any) -> Any:
        raise FileNotFoundError(2, "gone", "text.txt")

    monkeypatch.setattr(streamline.Streamline, "compress", fails)
    with pytest.raises(FileNotFoundError):
        compress_cached(tiny_llama, make_recipe(), cache=tmp_path / "cache", progress=False)
    blocker = tmp_path / "file"
    blocker.write_text("")
    for start in (compress_cached, functools.partial(compress, output=tmp_path / "out")):
        with pytest.raises(CacheError, match="STREAMLINE_BENCH_CACHE"):
            start(tiny_llama, recipe=make_recipe(), cache=blocker / "cache", progress=False)


def test_a_compressed_model_is_not_compressed_again(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe("streamline_none")
    out = compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    with pytest.raises(RecipeError, match="compressed already"):
        compress(out, recipe, tmp_path / "again", progress=False)


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_killed_in_training_then_resumed_gives_the_same_bytes(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from streamline_bench.compression import compress, load_recipe
        recipe = load_recipe("streamline", {{
            "calibration": {str(text_file)!r}, "sequence_length": 16, "n_layers": 2,
            "training.min_steps": 60, "training.batch_size": 2, "training.checkpoint_every": 5,
        }})
        import sys
        compress({str(tiny_llama)!r}, recipe, Path(sys.argv[1]), progress=False)
        """
    )

    def start(output: Path, cache: Path) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "STREAMLINE_BENCH_CACHE": str(cache)}
        return subprocess.Popen([sys.executable, "-c", script, str(output)], env=environment)

    assert start(tmp_path / "whole", tmp_path / "cache-a").wait() == 0
    victim = start(tmp_path / "killed", tmp_path / "cache-b")
    deadline = time.time() + 240
    while victim.poll() is None and time.time() < deadline:
        if any((tmp_path / "cache-b" / "work").glob("*/training/**/*.safetensors")):
            victim.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert victim.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert start(tmp_path / "killed", tmp_path / "cache-b").wait() == 0
    assert _digest(tmp_path / "killed") == _digest(tmp_path / "whole")
    leftovers = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert leftovers == []
