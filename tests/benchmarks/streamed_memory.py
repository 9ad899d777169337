"""Peak memory of compressions with the weights in memory and streamed layer by layer.

A synthetic float16 Llama checkpoint (32 layers of 25.7 MB, 1 GB in all; with ``--hidden 2048`` of
102.8 MB, 3.6 GB in all) is compressed in a process of its own per recipe and placement. Printed is
the peak of the resident set over that after the imports, as a multiple of the checkpoint's bytes:
all of it, its anonymous part (what is not anonymous is pages of mapped files, which the system
takes back when it needs memory), and what was forecast from the headers; the anonymous part also
as so many layers in float32.

    python tests/benchmarks/streamed_memory.py [--folder /tmp] [--layers 32] [--hidden 1024]
        [--placements streamed] [--recipes streamline_none,shortgpt,...] [--samples 4] [--length 64]

With ``--model FOLDER`` the checkpoint is made there if it is not there yet, and stays, so that
recipes can be measured one call after the other.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPES = (
    "streamline_none,shortgpt,last_layers,streamline,slicegpt,replaceme_lstsq,sleb,"
    "shortened_llama_taylor,llm_pruner"
)
VOCABULARY = 32_000
SHARD = 200_000_000


def write_checkpoint(folder: Path, layers: int, hidden: int) -> tuple[int, int]:
    """Write random weights, a tokenizer and text; return the bytes of all, and of a layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    inside = hidden * 11 // 4
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inside,
        num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16, dtype="float16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    write_tokenizer(folder, VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(VOCABULARY - 3, (200,), generator=generator) for _ in range(200)]
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in row.tolist())}) for row in rows]
    (folder / "calibration.jsonl").write_text("\n".join(lines) + "\n")

    def shapes() -> Any:
        yield "model.embed_tokens.weight", (VOCABULARY, hidden)
        for layer in range(layers):
            at = f"model.layers.{layer}."
            for name in "qkvo":
                yield f"{at}self_attn.{name}_proj.weight", (hidden, hidden)
            for name in ("gate", "up"):
                yield f"{at}mlp.{name}_proj.weight", (inside, hidden)
            yield f"{at}mlp.down_proj.weight", (hidden, inside)
            for name in ("input", "post_attention"):
                yield f"{at}{name}_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (VOCABULARY, hidden)

    weight_map, shard, total, number = {}, {}, 0, 0

    def write() -> None:
        save_file(shard, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
        shard.clear()

    for name, shape in shapes():
        drawn = torch.randn(shape, generator=generator) if len(shape) > 1 else torch.ones(shape)
        shard[name] = (drawn * (0.02 if len(shape) > 1 else 1)).half()
        weight_map[name] = f"model-{number:05d}.safetensors"
        total += shard[name].nbytes
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            write()
            number += 1
    if shard:
        write()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    layer = 2 * (4 * hidden**2 + 3 * hidden * inside + 2 * hidden)
    return total, layer


def checkpoint(folder: Path, layers: int, hidden: int) -> tuple[int, int]:
    """Do the same where it is not done; another checkpoint there is an error."""
    note = folder / "sizes.json"
    if not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps([layers, hidden, *write_checkpoint(folder, layers, hidden)]))
    *made, size, layer = json.loads(note.read_text())
    if made != [layers, hidden]:
        raise SystemExit(f"{folder} has {made[0]} layers of {made[1]} channels: another one")
    return size, layer


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer of the words w0, w1, …, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(vocabulary - 3)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


def resident() -> tuple[int, int]:
    """Return the resident set of this process and its anonymous part, in bytes."""
    rows = Path("/proc/self/status").read_text().splitlines()
    found = {row.split(":")[0]: int(row.split()[1]) * 1024 for row in rows if row.startswith("Rss")}
    return sum(found.values()), found["RssAnon"]


def peaks_of(call: Callable[[], object]) -> list[int]:
    """Return how much both grow, at most, while something is done."""
    import_all()
    peaks, ended = [0, 0], threading.Event()
    base = resident()

    def watch() -> None:
        while not ended.wait(0.005):
            for place, value in enumerate(resident()):
                peaks[place] = max(peaks[place], value - base[place])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        ended.set()
        watcher.join()
    return peaks


def import_all() -> None:
    """Import what a compression imports while it runs."""
    for module in (
        "accelerate",
        "datasets",
        "peft",
        "torch._dynamo",  # which an optimizer's first step imports
        "transformers.core_model_loading",
        "streamline_bench.compression.pipeline",
        "streamline_bench.core.training",
        "streamline_bench.core.scan",
        "transformers.models.llama.modeling_llama",
    ):
        importlib.import_module(module)


def measure(
    folder: Path, output: Path, name: str, placement: str, samples: int, length: int
) -> None:
    """Compress, and print the peaks over the resident set after the imports as JSON."""
    from streamline_bench.compression import compress, load_recipe
    from streamline_bench.compression.recipes import applicable
    from streamline_bench.methods.base import get_method

    given: dict[str, Any] = {"calibration": "auto", "calibration.samples": samples}
    given |= {"sequence_length": length, "training.min_steps": 2, "training.epochs": 1}
    given |= {"training.data.samples": 8, "training.data.sequence_length": length}
    given |= {"training.batch_size": 2, "training.gradient_accumulation": 2}
    if name in ("slicegpt", "replaceme_lstsq"):  # they need as many tokens as channels
        hidden = json.loads((folder / "config.json").read_text())["hidden_size"]
        given["calibration.samples"] = max(samples, 9 * hidden // (8 * length))
    if name == "sleb":
        given["n_layers"] = 1
    recipe = load_recipe(name, applicable(given, load_recipe(name)))
    get_method(recipe.method)

    from streamline_bench.compression.forecast import forecast
    from streamline_bench.modeling.loading import SourceModel

    source = SourceModel.find(folder, progress=False)
    expected = forecast(
        source, recipe, device="cpu", dtype=None, streamed=placement == "streamed"
    ).host
    started = time.monotonic()
    own = output.with_name(f"{output.name}-cache")  # without the scan of another run
    where: Any = placement
    peaks = peaks_of(
        lambda: compress(folder, recipe, output, placement=where, cache=own, progress=False)
    )
    seconds = time.monotonic() - started
    print(json.dumps({"peaks": peaks, "forecast": expected, "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made for the time")
    parser.add_argument("--model", type=Path, help="a checkpoint that stays")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1_024)
    parser.add_argument("--placements", default="streamed,resident")
    parser.add_argument("--recipes", default=RECIPES)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, output, name, placement = options.measure
        size = (options.samples, options.length)
        return measure(Path(folder), Path(output), name, placement, *size)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        model = options.model or Path(place) / "model"
        size, layer = checkpoint(model, options.layers, options.hidden)
        print(f"{size / 1e9:.2f} GB; peaks over the imports, as multiples of it")
        for name in options.recipes.split(","):
            for placement in options.placements.split(","):
                output = Path(place) / "out"
                command = [sys.executable, __file__, "--samples", str(options.samples)]
                command += ["--length", str(options.length), "--measure", str(model), str(output)]
                cache = {"STREAMLINE_BENCH_CACHE": str(Path(place) / "cache")}
                ended = subprocess.run(
                    [*command, name, placement], capture_output=True, text=True,
                    env={**os.environ, **cache}, check=False,
                )  # fmt: skip
                subprocess.run(["rm", "-rf", str(output)], check=True)
                if ended.returncode:
                    said = ended.stderr.strip().splitlines() or ["?"]
                    print(f"{name:18} {placement:9} {said[-1]}")
                    continue
                found = json.loads(ended.stdout.splitlines()[-1])
                whole, own = (peak / size for peak in found["peaks"])
                said = sum(found["forecast"].values()) / size
                shown = f"{whole:5.2f} all {own:5.2f} anonymous {said:5.2f} forecast "
                shown += f"{found['peaks'][1] / (2 * layer):5.1f} layers "
                shown += f"{found['seconds']:6.1f} s"
                print(f"{name:18} {placement:9} {shown}", flush=True)
    return None


if __name__ == "__main__":
    main()
