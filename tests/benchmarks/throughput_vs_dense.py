"""Tokens per second of a dense model and of its variants with a quarter less, in one run.

    python tests/benchmarks/throughput_vs_dense.py --engines hf,vllm --output reports/throughput

A random Llama in which layers dominate (24 layers, hidden 512, a small vocabulary) is compressed by
our own recipes with as little calibration and training as they take: speed depends on shapes, not
on what was learnt. ``--model`` takes another one. Blocks start every model's process anew, on one
thread; in a block the models take turns round by round; tokens are counted against processor
seconds, which other work on the machine disturbs less than wall time. A copy of dense shows what is
noise. Printed and written: the ratio to dense with its interval over the blocks, the ideal by bytes
moved and operations, and the share of it that was reached.
Target: at least 0.95 of the ideal for models that lost whole layers.

``--records`` measures nothing and writes the tables of records of ``streamline-bench throughput``;
those of ``--serve`` get tables of their own. ``--self-checks`` takes repeated small runs with
``--self-check``, and counts how often the interval of the copy holds 1.
Target: 9 of 10.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from streamline_bench.core.files import atomic_write_text
from streamline_bench.throughput import Setup, ThroughputRecord, Workload, measure, read_record

sys.path.insert(0, str(Path(__file__).parent))

from throughput_tables import markdown, summary

VARIANTS = {
    "none": "streamline_none",
    "layer": "streamline",
    "ffn": "streamline_ffn",
    "swiglu_res": "streamline_swiglu_res",
    "llm_pruner": "llm_pruner_uniform",
    "slicegpt": "slicegpt",
}
"""What it is called in the table -> recipe."""

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build_dense(folder: Path, sizes: dict[str, Any]) -> None:
    """Save a random Llama with a tokenizer of its vocabulary."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    model.save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(sizes["vocab_size"] - 4))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)


def build_variants(
    work: Path, sizes: dict[str, Any], names: list[str], model: Path | None
) -> dict[str, Path]:
    """Return label -> folder of the dense model and the variants asked for, made in ``work``."""
    from streamline_bench.compression import compress, load_recipe

    dense, text = model or work / "dense", work / "text.txt"
    if model is None:
        build_dense(dense, sizes)
    lines = [" ".join(f"w{(i * 7 + j * 13) % 900}" for j in range(80)) for i in range(40)]
    text.write_text("\n\n".join(lines), encoding="utf-8")
    small = {"calibration": str(text), "sequence_length": 32, "sparsity": 0.25}
    folders = {"dense": dense}
    for name in names:
        recipe = load_recipe(VARIANTS[name], small)
        if recipe.training.objective != "none":
            few = {**small, "training.min_steps": 2, "training.epochs": 1}
            recipe = load_recipe(VARIANTS[name], few)
        print(f"compressing: {name}", flush=True)
        folders[name] = compress(dense, recipe, work / name, progress=False)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", default="hf", help="hf, vllm or both")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--until-precision", type=float)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--model", type=Path, help="a dense model in place of the random one")
    parser.add_argument(
        "--about", default="A Llama with random weights", help="what the report calls the model"
    )
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--folder", type=Path, help="where the models are made, and kept")
    parser.add_argument("--output", type=Path, help="folder for throughput.json and throughput.md")
    parser.add_argument(
        "--records",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="measure nothing: write the table of these records (of `streamline-bench throughput`)",
    )
    parser.add_argument("--self-checks", nargs="+", type=Path, metavar="FOLDER", default=[])
    options = parser.parse_args()
    sizes = {**SIZES, "num_hidden_layers": options.layers}
    if options.model is not None:
        sizes = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    if options.records:
        records = [read_record(folder) for folder in options.records]
    else:
        records = measured(options, sizes)
    again = [read_record(folder) for folder in options.self_checks]
    text = markdown(records, sizes, again, options.about)
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        payload = json.dumps(summary(records, sizes, again), indent=2)
        atomic_write_text(options.output / "throughput.json", payload + "\n")
        atomic_write_text(options.output / "throughput.md", text)


def measured(options: argparse.Namespace, sizes: dict[str, Any]) -> list[ThroughputRecord]:
    """Make the models, or take those of an earlier run, and measure them with every engine."""
    workload = Workload(
        batch_sizes=tuple(int(size) for size in options.batch.split(",")),
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        blocks=options.blocks,
        until_precision=options.until_precision,
        minutes=options.minutes,
        self_check=True,
        rounds=options.rounds,
    )
    names = options.variants.split(",")
    with tempfile.TemporaryDirectory() as passing:
        work = options.folder or Path(passing)
        work.mkdir(parents=True, exist_ok=True)
        list_of_made = work / "made.json"
        if list_of_made.exists():
            folders = {name: Path(at) for name, at in json.loads(list_of_made.read_text()).items()}
        else:
            folders = build_variants(work, sizes, names, options.model)
            made = {name: str(folder) for name, folder in folders.items()}
            atomic_write_text(list_of_made, json.dumps(made))
        return [
            measure(
                folders, dense="dense", engine=engine, workload=workload, setup=Setup(threads=1)
            )
            for engine in options.engines.split(",")
        ]


if __name__ == "__main__":
    main()
