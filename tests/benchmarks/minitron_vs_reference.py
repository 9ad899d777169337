"""Minitron's scores beside those of NVIDIA's Model-Optimizer: same model, same tokens.

    git clone https://github.com/NVIDIA/Model-Optimizer REFERENCE
    python tests/benchmarks/minitron_vs_reference.py --reference REFERENCE \
        --model streamline_bench/demo/model --text streamline_bench/demo/model/calibration.jsonl

The reference needs Megatron-Core. The functions that score attention, MLPs and the hidden size are
taken from its ``mcore_minitron.py`` as they are and called with modules of the transformers model;
gathering over ranks is left out, and inputs are turned to sequence first. Of them nothing is kept
here. Reported: the largest relative difference of the scores, and how many of the units that a
quarter fewer would remove differ. Exit code 1 when one differs.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import tempfile
import types
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from streamline_bench.compression import load_recipe
from streamline_bench.core.architecture import decoder_layers
from streamline_bench.methods.base import Compression
from streamline_bench.methods.width.llm_pruner import highest
from streamline_bench.methods.width.minitron import importance
from streamline_bench.methods.width.minitron_sizes import MinitronParameters
from streamline_bench.modeling.loading import SourceModel
from streamline_bench.modeling.widths import LayerWidths

FUNCTIONS = ("hidden_size", "self_attention", "mlp")
KINDS = (
    "TransformerLayer Attention SelfAttention MoELayer MLP MambaLayer MCoreLanguageModel".split()
)


def reference(folder: Path) -> dict[str, Any]:
    """Return the reference's functions, in a module with stand-ins for Megatron's names."""
    path = folder / "modelopt" / "torch" / "prune" / "plugins" / "mcore_minitron.py"
    wanted = {f"_register_{name}_importance" for name in FUNCTIONS}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in tree.body if getattr(node, "name", None) in wanted]
    future = ast.parse("from __future__ import annotations").body
    space: dict[str, Any] = {
        "torch": torch, "partial": partial,
        "gather_from_tensor_model_parallel_region": lambda tensor: tensor,
        "_fused_ln_linears_over_hidden_size": lambda module: [],
        **{f"_Dynamic{name}": type(name, (), {}) for name in KINDS},
    }  # fmt: skip
    torch.distributed.all_reduce = lambda *args, **kwargs: None  # type: ignore[assignment]
    exec(compile(ast.Module([*future, *found], []), str(path), "exec"), space)
    return space


class Registry:
    """Puts the reference's hooks on modules, and keeps what it registers."""

    def __init__(self) -> None:
        self.scores: dict[tuple[int, str], Any] = {}

    def register_hook(self, module: Any, hook: Any, hook_type: str = "forward", **_: Any) -> None:
        def turned(inner: Any, args: Any, output: Any) -> None:
            hook(inner, tuple(each.transpose(0, 1) for each in args), output.transpose(0, 1))

        module.register_forward_hook(turned)

    def register_importance(self, module: Any, name: str, score: Any, **_: Any) -> None:
        self.scores[id(module), name] = score


class Stand:
    """Has the attributes that the reference's functions ask of a Megatron module."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def _register_temp_attribute(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def get_hparam(self, name: str) -> Any:
        return types.SimpleNamespace(max=self.heads)  # type: ignore[attr-defined]


def reference_scores(space: dict[str, Any], model: Any, sequences: Any) -> dict[str, Any]:
    """Return scores of channels and of the stream, and the ranking of heads."""
    registry, config = Registry(), model.config
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    mlps, attentions, layers = [], [], []
    for layer in decoder_layers(model):
        mlps.append(Stand(linear_fc2=layer.mlp.down_proj, hparam_name="ffn_hidden_size"))
        attentions.append(
            Stand(
                linear_proj=layer.self_attn.o_proj, heads=heads,
                num_query_groups_per_partition=config.num_key_value_heads,
                config=types.SimpleNamespace(kv_channels=size),
            )
        )  # fmt: skip
        stand, attention, mlp = (
            space[f"_Dynamic{name}"]() for name in ("TransformerLayer", "Attention", "MoELayer")
        )
        attention._has_fused_input_layernorm = False
        stand.self_attention, stand.mlp = attention, mlp
        stand.input_layernorm = layer.input_layernorm
        stand.pre_mlp_layernorm = layer.post_attention_layernorm
        layers.append(stand)
    whole = Stand(decoder=types.SimpleNamespace(layers=layers))
    space["_register_hidden_size_importance"](whole, registry)
    for mlp, attention in zip(mlps, attentions, strict=True):
        space["_register_mlp_importance"](mlp, registry)
        space["_register_self_attention_importance"](attention, registry)
    with torch.no_grad():
        for ids in sequences:
            model(ids[None], use_cache=False)
    return {
        "stream": registry.scores[id(whole), "hidden_size"](),
        "channels": [registry.scores[id(mlp), "ffn_hidden_size"]() for mlp in mlps],
        "heads": [registry.scores[id(each), "num_attention_heads"]() for each in attentions],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    asked = parser.parse_args()
    size = {"calibration.samples": asked.samples, "sequence_length": asked.length}
    recipe = load_recipe("minitron", {"calibration": asked.text, **size})
    work = Compression(SourceModel(asked.model), recipe, Path(tempfile.mkdtemp()), progress=False)
    tokens, model = work.tokens(recipe.calibration), work.model
    widths = LayerWidths(
        model.config.num_attention_heads,
        model.config.num_key_value_heads,
        model.config.intermediate_size,
    )
    options = MinitronParameters(axes=("stream", "heads", "channels"), batch_size=8)
    layers = range(model.config.num_hidden_layers)
    ours = importance(work, layers, widths, options, tokens)
    theirs = reference_scores(reference(asked.reference), model, tokens.input_ids)
    assert ours.stream is not None
    pairs = [("stream", ours.stream, theirs["stream"])]
    pairs += [("channels", ours.units[i].channel, theirs["channels"][i]) for i in layers]
    different = 0
    print(f"{len(tokens)} sequences of {asked.length} tokens, {len(layers)} layers")
    for kind in ("stream", "channels"):
        both = [(a, b.double()) for name, a, b in pairs if name == kind]
        error = max(float(((a - b) / b).abs().max()) for a, b in both)
        apart = sum(
            len(set(highest(a, len(a) // 4).tolist()) ^ set(highest(b, len(b) // 4).tolist())) // 2
            for a, b in both
        )
        different += apart
        print(f"{kind}: largest relative difference {error:.1e}, units that differ {apart}")
    groups = widths.num_key_value_heads
    for i in layers:
        within = ours.units[i].query.view(groups, -1)
        order = (
            within.argsort(dim=1, descending=True)
            + (torch.arange(groups) * within.shape[1])[:, None]
        )
        different += int((order.flatten() != theirs["heads"][i]).sum())
    print(f"heads: rankings within groups that differ, and all units: {different}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
