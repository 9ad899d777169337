"""LLM-Pruner beside its authors' implementation: which units go, on the same model and tokens.

    git clone https://github.com/horseee/LLM-Pruner REFERENCE
    python -m venv OLD && OLD/bin/pip install torch "transformers==4.36.2" sentencepiece numpy
    python tests/benchmarks/llm_pruner_vs_reference.py --reference REFERENCE --python OLD/bin/python

Models are random; with ``--model FOLDER --text FILE`` it is that trained Llama on that text.

The reference runs unchanged in a process of its own, with the interpreter given, as its
``hf_prune.py`` (as many key-value heads as heads) and its ``llama3.py`` (fewer) set it up; of it
nothing is kept here. Reported: for each criterion, in how many pruned layers the same heads go, how
many channels are kept by one side only, and the parameters left on either side. ``llama3.py`` adds
the scores of query heads to key-value heads in another order than attention shares them (query head
h to h modulo their number); the second figure is ours scored in that order.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

TAKEN_OVER = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads max_position_embeddings rms_norm_eps tie_word_embeddings"
).split()
CRITERIA = ("param_first", "param_second", "param_mix", "vectorize", "l1", "l2")
RATIO = 0.25
SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}


def main() -> None:
    """Print one table per form of attention."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", required=True, help="checkout of the authors' code")
    parser.add_argument("--python", default=sys.executable, help="interpreter that can run it")
    parser.add_argument("--model", help="folder of a trained Llama, instead of random ones")
    parser.add_argument("--text", help="file with calibration text for --model")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        run_reference(arguments.reference, Path(arguments.inside))
        return
    if arguments.model:
        compare(arguments, *trained(arguments.model, arguments.text))
        return
    for kv_heads in (8, 4):
        compare(arguments, *example(kv_heads))


def compare(arguments: argparse.Namespace, model: Any, ids: torch.Tensor) -> None:
    """Prune one model on both sides by every criterion."""
    from streamline_bench.methods.width.llm_pruner import LLMPrunerParameters

    config = model.config
    layers = LLMPrunerParameters().layers(config.num_hidden_layers)
    heads = f"{config.num_attention_heads} heads, {config.num_key_value_heads} key-value heads"
    print(
        f"\n{heads}, layers {layers[0]} to {layers[-1]} of {config.num_hidden_layers}, "
        f"ratio {RATIO}\n"
    )
    print("| criterion | layers with the same heads | in its order | channels | parameters |")
    print("|---|---|---|---|---|")
    for criterion in CRITERIA:
        ours, our_size = our_units(model, layers, ids, criterion)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            torch.save(
                {
                    "config": {key: getattr(config, key) for key in TAKEN_OVER},
                    "layers": list(layers),
                    "state": model.state_dict(),
                    "ids": ids,
                    "criterion": criterion,
                },
                place / "case.pt",
            )
            command = [arguments.python, __file__, "--reference", arguments.reference]
            done = subprocess.run([*command, "--inside", folder], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            theirs = json.loads((place / "units.json").read_text())
        same, reordered = (
            sum(ours[layer][key] == theirs[str(layer)]["heads"] for layer in layers)
            for key in ("heads", "reordered")
        )
        differ = sum(
            len(set(ours[layer]["channels"]) ^ set(theirs[str(layer)]["channels"]))
            for layer in layers
        )
        sizes = f"{our_size} / {theirs['parameters']}"
        print(
            f"| {criterion} | {same} of {len(layers)} | {reordered} of {len(layers)} | {differ} | "
            f"{sizes} |",
            flush=True,
        )


def example(kv_heads: int) -> tuple[Any, torch.Tensor]:
    """Return a random Llama and ten sequences of 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=kv_heads)).eval()
    return model, torch.randint(3, 100, (10, 64))


def trained(folder: str, text: str | None) -> tuple[Any, torch.Tensor]:
    """Return a model from disk and ten sequences of 64 tokens of a text."""
    from streamline_bench.core.data.calibration import load_calibration
    from streamline_bench.core.recipe.schema import CalibrationSpec
    from streamline_bench.modeling.loading import load_model, load_tokenizer

    place = Path(folder)
    spec = CalibrationSpec(source=text or "auto", samples=10, sequence_length=64)
    tokens = load_calibration(spec, load_tokenizer(place), model_folder=place, progress=False)
    return load_model(place, device="cpu"), tokens.input_ids


def our_units(
    model: Any, chosen: range, ids: torch.Tensor, criterion: Any
) -> tuple[dict[int, Any], int]:
    """Return layer -> kept heads and channels, and the parameters left."""
    from streamline_bench.core.architecture import architecture_of, decoder_layers
    from streamline_bench.core.data.calibration import CalibrationTokens
    from streamline_bench.methods.tools.gradients import sum_gradients
    from streamline_bench.methods.width.llm_pruner import keep_units, salience, score_units
    from streamline_bench.methods.width.width_plan import plan_widths, prunable
    from streamline_bench.modeling.widths import LayerWidths, projection_parts

    row = architecture_of(model.config)
    widths = LayerWidths.of(model.config, row)
    parts = projection_parts(row, widths, model.config)
    plan = plan_widths(prunable(model.config), chosen, ratio=RATIO, multiple=1)
    layers = decoder_layers(model)
    weights: dict[Any, Any] = {
        (layer, part.module): layers[layer].get_submodule(part.module).weight
        for layer in chosen
        for part in parts
    }
    tokens = CalibrationTokens(ids, torch.ones_like(ids, dtype=torch.bool), "", ids.numel(), "")
    sums = sum_gradients(model, weights, tokens, squares=True, progress=False)
    units = {}
    for layer in chosen:
        scores = score_units(
            layer,
            parts,
            widths,
            lambda module, at=layer: salience(weights[at, module], criterion, sums[at, module]),
            vectorize=criterion == "vectorize",
        )
        kept = keep_units(scores, plan.head_units, plan.channels)
        groups = widths.num_key_value_heads
        in_turn = scores.query.view(-1, groups).T.reshape(-1)
        counts = plan.head_units, plan.channels
        reordered = keep_units(dataclasses.replace(scores, query=in_turn), *counts)
        units[layer] = {
            "heads": kept.key_value.tolist(),
            "reordered": reordered.key_value.tolist(),
            "channels": kept.channel.tolist(),
        }
    return units, plan.total - plan.removed


def run_reference(checkout: str, place: Path) -> None:
    """In the reference's own interpreter: prune ``case.pt`` there, write what is kept."""
    sys.path.insert(0, checkout)
    import LLMPruner.torch_pruning as pruning
    from LLMPruner.pruner import hf_llama_pruner as parts

    case = torch.load(place / "case.pt")
    criterion, ids = case["criterion"], case["ids"]
    shared = case["config"]["num_key_value_heads"] < case["config"]["num_attention_heads"]
    model, norm_class = reference_model(case, shared)
    layers = [model.model.layers[index] for index in case["layers"]]
    first = "k_proj" if shared else "q_proj"
    importance = (
        parts.MagnitudeImportance(p=int(criterion[1]))
        if criterion in ("l1", "l2")
        else parts.TaylorImportance(group_reduction="sum", taylor=criterion)
    )
    before = [copy.deepcopy(layer) for layer in layers]
    pruner = pruning.pruner.MetaPruner(
        model,
        ids[:2, :8],
        importance=importance,
        global_pruning=False,
        iterative_steps=1,
        ch_sparsity=RATIO,
        ignored_layers=[],
        channel_groups={},
        consecutive_groups={
            getattr(layer.self_attn, first): layer.self_attn.head_dim
            for layer in model.model.layers
        },
        customized_pruners={norm_class: parts.hf_rmsnorm_pruner},
        root_module_types=None,
        root_instances=[getattr(layer.self_attn, first) for layer in layers]
        + [layer.mlp.gate_proj for layer in layers],
    )
    reference_gradients(model, ids, squares=criterion in ("param_second", "param_mix"))
    pruner.step()
    units: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for index, old, new in zip(case["layers"], before, layers, strict=True):
        size = new.self_attn.head_dim
        rows = kept_rows(getattr(old.self_attn, first), getattr(new.self_attn, first))
        units[str(index)] = {
            "heads": sorted({row // size for row in rows}),
            "channels": kept_rows(old.mlp.gate_proj, new.mlp.gate_proj),
        }
    (place / "units.json").write_text(json.dumps(units))


def reference_model(case: dict[str, Any], shared: bool) -> tuple[Any, Any]:
    """Return the model and its norm's class, of the class that the respective script loads."""
    from transformers import LlamaConfig

    if shared:
        from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRMSNorm
    else:
        from LLMPruner.models.hf_llama.modeling_llama import LlamaForCausalLM, LlamaRMSNorm
    config = LlamaConfig(**case["config"])
    config.use_cache = False
    model = LlamaForCausalLM(config)
    missing, _ = model.load_state_dict(case["state"], strict=False)
    if any("inv_freq" not in name for name in missing):
        raise SystemExit(f"weights missing: {missing}")
    return model.float().eval().requires_grad_(True), LlamaRMSNorm


def reference_gradients(model: Any, ids: torch.Tensor, *, squares: bool) -> None:
    """Leave the gradients, and their mean squares, where the reference looks for them."""
    for row in ids.split(1) if squares else ():
        model.zero_grad()
        model(row, labels=row).loss.backward()
        for parameter in model.parameters():
            squared = parameter.grad**2 / len(ids)
            parameter.acc_grad = getattr(parameter, "acc_grad", 0) + squared
    model.zero_grad()
    model(ids, labels=ids).loss.backward()


def kept_rows(old: Any, new: Any) -> list[int]:
    """Return which rows of ``old`` are in ``new``."""
    rows = {tuple(row.tolist()) for row in new.weight}
    return [index for index, row in enumerate(old.weight) if tuple(row.tolist()) in rows]


if __name__ == "__main__":
    main()
