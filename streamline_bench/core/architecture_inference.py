"""Rows of the architecture table for families without one, found by looking at the model itself.

The model is built from its config on torch's meta device, without weights. Its list of layers is
the largest ``ModuleList`` that is as long as an entry of the config says. What the layers consist
of is found by :mod:`.architecture_roles`; what a removal would change is checked by
:mod:`.architecture_guard`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from streamline_bench.core.architecture import Architecture, config_of
from streamline_bench.core.architecture_roles import layer_roles, trace
from streamline_bench.core.checkpoint.quantization import plain_config
from streamline_bench.errors import ArchitectureError, library_errors

_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
_EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
_PREFIX = re.compile(r"first_k_|num_dense_layers|max_window_layers|layer_start_index")
_INDICES = re.compile(r"idx|indices|indexes|_ids$|_layers$")
_NO_LAYERS = re.compile(r"token|multiplier|limit|language|label|architectures|shape|cycles|mtp_")
_ELSEWHERE = re.compile(r"\.\d+\.|vision|image|audio|speech")  # inside a layer, or not of the text
_CROSS = re.compile(r"encoder_attn|cross_?att")
_PERIODS = {"decoder_sparse_step": "mlp_only_layers"}
_NOTES = {"_name_or_path", "transformers_version", "use_cache", "architectures"}
_OLD_BUFFERS = (
    *(f".{where}.{what}" for where in ("attn", "attention") for what in ("bias", "masked_bias")),
    ".attn.causal_mask", ".rotary_emb.inv_freq", ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
)  # fmt: skip
"""Masks and tables that older versions of transformers stored with the weights."""
_OURS = ("host_model_type", "attachments", "layer_widths", "rotations", "removed_sublayers")


def infer(config: Any) -> Architecture:
    """Return the row of a config's family, from the model that transformers builds of it.

    Args:
        config: a transformers config, or a parsed ``config.json`` of a type that it knows.

    Raises:
        ArchitectureError: the type is unknown, or is not a causal decoder with one list of layers.
    """
    config = as_object(config)
    return _infer(Configured(config))


class Configured:
    """A config that is hashed by its content, so that each is looked at once per process."""

    def __init__(self, config: Any) -> None:
        self.config = config
        entries = {k: v for k, v in entries_of(config).items() if k not in _NOTES}
        text = json.dumps([str(type(config)), entries], sort_keys=True, default=str)
        self._digest = hashlib.sha256(text.encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self._digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Configured) and self._digest == other._digest


@lru_cache(maxsize=64)
def _infer(configured: Configured) -> Architecture:
    config = configured.config
    _require_decoder(config)
    model = meta_model(config)
    path, depth_key = _find_layers(model, config)
    layers: Any = model.get_submodule(path)
    crossed = [name for name, _ in layers[0].named_children() if _CROSS.search(name)]
    if crossed:
        raise ArchitectureError(
            f"Model type '{config.model_type}' is not supported: its layers attend to an encoder "
            f"({crossed[0]}); give a decoder-only causal language model."
        )
    entries = entries_of(config)
    arguments = list(inspect.signature(layers[0].forward).parameters)
    if "hidden_states" in arguments[1:]:
        raise ArchitectureError(
            f"Model type '{config.model_type}' is not supported: its layers pass on two streams "
            f"('{arguments[0]}' and 'hidden_states'), and all methods look at one; give another "
            "model."
        )
    calls = trace(model, layers)
    outside = _outside(model, path, calls.before)
    return Architecture(
        config.model_type,
        inferred=True,
        base=_base(model, path),
        layers=path,
        depth_key=depth_key,
        **outside,
        **layer_roles(layers, calls, entries),
        **layer_entries(entries, len(layers), depth_key, type(config)),
        buffers=_buffers(model),
        stored_as=_stored_as(
            model, path, [*outside["embeddings"], outside["final_norm"], outside["lm_head"]]
        ),
    )


def as_object(config: Any) -> Any:
    """Return a transformers config for one, for a parsed ``config.json``, or for a host's.

    Raises:
        ArchitectureError: transformers knows no such type, or cannot read the entries.
    """
    from transformers import CONFIG_MAPPING

    entries = dict(config) if isinstance(config, Mapping) else None
    if entries is None and not getattr(config, "host_model_type", ""):
        return config
    entries = entries_of(config) if entries is None else entries
    model_type = entries.get("host_model_type") or entries.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise unknown_type(model_type)
    entries = {k: v for k, v in entries.items() if k not in (*_OURS, "model_type")}
    with library_errors(
        f"The config of model type '{model_type}' cannot be read",
        "correct config.json",
        ArchitectureError,
    ):
        return config_of(CONFIG_MAPPING[model_type], entries)


def unknown_type(model_type: Any) -> ArchitectureError:
    """Return the error for a type that transformers does not know."""
    from transformers import __version__

    return ArchitectureError(
        f"Model type '{model_type}' is not supported: transformers {__version__} knows no such "
        "type; upgrade transformers, or pass --trust-remote-code if the model brings its own code."
    )


def entries_of(config: Any) -> dict[str, Any]:
    """Return all entries of a config as its ``config.json`` would hold them."""
    if isinstance(config, Mapping):
        return dict(config)
    entries: dict[str, Any] = config.to_dict()
    return entries


def _require_decoder(config: Any) -> None:
    reason = ""
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder model"
    elif (
        config.to_dict().get("add_cross_attention") is not None
        and getattr(config, "is_decoder", 1) is False
    ):
        reason = "it is an encoder, which reads in both directions (is_decoder=False)"
    elif getattr(config, "causal", True) is False or getattr(config, "attn_type", "") == "bi":
        reason = "it is no causal model: its attention reads in both directions"
    if reason:
        raise ArchitectureError(
            f"Model type '{config.model_type}' is not supported: {reason}; give a decoder-only "
            "causal language model."
        )


@contextmanager
def _quietly() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def meta_model(config: Any) -> Any:
    """Return the causal LM of a config on the meta device; the last few are kept.

    Code that comes with a model runs only where the config itself is of such a class, which the
    user has allowed by loading it.

    Raises:
        ArchitectureError: transformers has no causal LM of this type, or cannot build it.
    """
    return _meta_model(Configured(config))


@lru_cache(maxsize=8)
def _meta_model(configured: Configured) -> Any:
    from transformers import AutoModelForCausalLM

    config = plain_config(configured.config)
    remote = type(config).__module__.startswith("transformers_modules")
    if not remote and type(config) not in AutoModelForCausalLM._model_mapping:
        raise ArchitectureError(
            f"Model type '{config.model_type}' is not supported: transformers has no causal "
            "language model of this type; give a decoder-only causal language model."
        )
    with (
        library_errors(
            f"No model can be built from the config of model type '{config.model_type}'",
            "correct config.json",
            ArchitectureError,
        ),
        _quietly(),
        torch.device("meta"),
    ):
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=remote, attn_implementation="eager"
        ).eval()


def _find_layers(model: Any, config: Any) -> tuple[str, str]:
    """Return the path of the list of layers, and the config entry that counts them."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not _ELSEWHERE.search(f".{name}.")
    }
    names = config.attribute_map
    entries = entries_of(config)
    for key in dict.fromkeys(
        (*(names.get(key, key) for key in _DEPTH_KEYS), *_layer_counts(entries))
    ):
        depth = entries.get(key, getattr(config, key, None))  # it may be computed
        as_long = {name: module for name, module in found.items() if len(module) == depth}
        if as_long:
            return _largest(as_long, config.model_type), key
    if entries.get("text_config"):
        raise ArchitectureError(
            f"Model type '{config.model_type}' is not supported as it is: it wraps a text model, "
            "whose settings are in its text_config; give the text model."
        )
    raise ArchitectureError(
        f"Model type '{config.model_type}' is not supported: no entry of its config counts the "
        f"modules of one of its lists ({', '.join(found) or 'it has none'}); give another model."
    )


def _layer_counts(entries: Mapping[str, Any]) -> list[str]:
    return [key for key in entries if re.search("layers|blocks", key)]


def _largest(lists: Mapping[str, nn.ModuleList], model_type: str) -> str:
    sizes = {n: sum(p.numel() for p in module.parameters()) for n, module in lists.items()}
    best = max(sizes, key=lambda name: sizes[name])
    others = [n for n, size in sizes.items() if n != best and 10 * size > sizes[best]]
    if others:
        raise ArchitectureError(
            f"Model type '{model_type}' is not supported: its layers lie in several lists of the "
            f"same length ({', '.join([best, *others])}), of which none is a stack of whole "
            "layers; give another model."
        )
    return best


def _base(model: Any, layers: str) -> str:
    prefix = model.base_model_prefix
    return prefix if layers.startswith(f"{prefix}.") else layers.partition(".")[0]


def _outside(model: Any, layers: str, before: list[str]) -> dict[str, Any]:
    """Find embeddings, final norm and head among the modules with weights outside the layers."""
    holders = [
        name
        for name, module in model.named_modules()
        if name and not f"{name}.".startswith(f"{layers}.") and module._parameters
    ]
    paths = {id(module): name for name, module in model.named_modules()}
    table = paths.get(id(model.get_input_embeddings()), "")
    head = paths.get(id(model.get_output_embeddings()), "")
    if not head:
        rows = model.get_input_embeddings().weight.shape[0]
        heads = [n for n in holders if _rows(model.get_submodule(n)) == rows and n != table]
        head = heads[-1] if heads else ""
    early = [name for name in holders if name in before and name not in (table, head)]
    if not before:  # nothing could be traced
        early = [n for n in holders if re.search(r"embed|wpe|position", n) and n != table]
    late = [name for name in holders if name not in (table, head, *early)]
    norms = [name for name in late if _is_norm(name, model.get_submodule(name))]
    embeddings = tuple(name for name in (table, *early) if name)
    return {
        "embeddings": embeddings,
        "final_norm": norms[-1] if norms else "",
        "lm_head": head,
    }


def _rows(module: Any) -> int:
    weight = getattr(module, "weight", None)
    return int(weight.shape[0]) if weight is not None and weight.dim() == 2 else 0


def _is_norm(name: str, module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() or bool(re.search(r"norm|ln_", name))


def _buffers(model: Any) -> tuple[str, ...]:
    names = [name for name, _ in model.named_buffers()]
    names += _stored_names(model, [name for name in names if name in model.state_dict()])
    endings = {f".{'.'.join(name.split('.')[-2:])}": None for name in names}
    weights = [name for name, _ in model.named_parameters()]
    for ending in _OLD_BUFFERS:
        if not any(name.endswith(ending) for name in weights):
            endings.setdefault(ending)
    return tuple(endings)


def _stored_names(model: Any, names: Iterable[str]) -> list[str]:
    """Return how checkpoints spell names of tensors, where transformers renames them on loading."""
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    return list(revert_weight_conversion(model, {name: state[name] for name in names}))


def _stored_as(model: Any, layers: str, others: Iterable[str]) -> dict[str, str]:
    """Return path -> its spelling in checkpoints, of the list of layers and of other modules."""
    state = model.state_dict()
    examples = {path: f"{path}.weight" for path in others if f"{path}.weight" in state}
    found = {
        path: _stored_names(model, [name])[0].removesuffix(".weight")
        for path, name in examples.items()
    }
    found[layers] = _stored_layers(model, layers)
    return {path: stored for path, stored in found.items() if stored != path}


def _stored_layers(model: Any, layers: str) -> str:
    """Return the path of the list of layers in checkpoints."""
    names = [name for name in model.state_dict() if name.startswith(f"{layers}.0.")]
    stored = _stored_names(model, names)
    paths = Counter(name.partition(".0.")[0] for name in stored if ".0." in name)
    path = paths.most_common(1)[0][0]
    outside = [name for name in stored if not name.startswith(f"{path}.")]
    if outside:
        raise ArchitectureError(
            f"Model type '{model.config.model_type}' is not supported: its checkpoints hold a part "
            f"of each layer outside of the layers ('{outside[0]}'), where it cannot follow its "
            "layer; give another model."
        )
    return path


def layer_entries(
    entries: Mapping[str, Any], depth: int, depth_key: str, kind: Any = None
) -> dict[str, Any]:
    """Sort the entries of a config that say something about single layers.

    Args:
        kind: class of the config: a list that it makes by itself, at any depth of the same length,
            is not one per layer.
    """
    lists: list[str] = []
    indices: list[str] = []
    for key, value in entries.items():
        if _NO_LAYERS.search(key) or not isinstance(value, (list, tuple)) or not value:
            continue
        if _is_index_list(key, value, depth):
            indices.append(key)
        elif (len(value) == depth or (len(value) > depth and "layer" in key)) and not _fixed_length(
            key, len(value), depth, depth_key, kind
        ):
            lists.append(key)
    prefixes = [k for k, v in entries.items() if _PREFIX.search(k) and _is_count(v)]
    periods = {k: v for k, v in _PERIODS.items() if k in entries and v in entries}
    indices += [key for key in periods.values() if key not in indices]
    return {
        "layer_lists": tuple(lists),
        "index_lists": tuple(indices),
        "prefix_counts": tuple(prefixes),
        "periods": periods,
        "extra_layers": next((k for k in _EXTRA_LAYERS if _is_count(entries.get(k))), ""),
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_index_list(key: str, value: Any, depth: int) -> bool:
    if not _INDICES.search(key) or not all(_is_count(item) for item in value):
        return False
    increasing = all(a < b for a, b in pairwise(value))
    return increasing and value[0] >= 0 and value[-1] < depth


def _fixed_length(key: str, length: int, depth: int, depth_key: str, kind: Any) -> bool:
    """Whether the config's class makes this list as long for a model with one layer more."""
    if kind is None:
        return False
    try:
        with _quietly():
            made = [kind(**{depth_key: depth + more}).to_dict().get(key) for more in (0, 1)]
    except Exception:  # no valid defaults: the length speaks
        return False
    return all(isinstance(each, (list, tuple)) and len(each) == length for each in made)
