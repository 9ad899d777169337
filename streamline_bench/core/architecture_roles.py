"""What the modules inside a layer are for: found from shapes, names and one traced pass.

The pass runs on the meta device, so that it costs no memory and computes nothing. It shows in
which order modules are called, and which tensor each is given: where a norm sits, and whether the
MLP reads what attention read. A role that cannot be decided stays empty.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

_ATTENTION = re.compile(r"attn|attention|self_att")
_MLP = re.compile(r"mlp|feed_forward|ffn|moe|mixer")
_QUERY = re.compile(r"(q_proj|query|project_q|wq|q_lin|q)$", re.IGNORECASE)
_KEY = re.compile(r"(k_proj|key|project_k|wk|k_lin|k)$", re.IGNORECASE)
_VALUE = re.compile(r"(v_proj|value|project_v|wv|v_lin|v)$", re.IGNORECASE)
_FUSED = re.compile(r"(qkv_proj|query_key_value|c_attn|wqkv|qkv)$", re.IGNORECASE)
_OUTPUT = re.compile(r"(o_proj|out_proj|dense|c_proj|attention_out|out_lin|wo)$", re.IGNORECASE)
_GATE = re.compile(r"gate|w1$|wi_0$|w_0$")
_NOT_MLP = re.compile(r"expert|router|(^|\.)gate$|shared|norm|adapter")
_EMPTY = {
    "attention": "", "query": "", "key": "", "value": "", "output": "", "fused_qkv": "",
    "mlp": "", "gate": "", "up": "", "down": "", "fused_gate_up": "", "experts": "", "router": "",
    "input_norm": "", "mlp_norm": "", "attention_output_norm": "", "mlp_output_norm": "",
    "intermediate_key": "",
}  # fmt: skip


class _Ended(Exception):  # noqa: N818 - a signal, not an error
    pass


@dataclass
class Calls:
    """What a traced pass called.

    Attributes:
        before: paths of the modules run before the first layer.
        inside: of the traced layer: path of a module -> (identity of the tensor that it was given,
            of the one that it gave).
        first: identity of the layer's own input.
        layer: index of the traced layer.
    """

    before: list[str] = field(default_factory=list)
    inside: dict[str, tuple[int, int]] = field(default_factory=dict)
    first: int = 0
    layer: int = 0


def trace(model: Any, layers: nn.ModuleList) -> Calls:
    """Run a model on the meta device up to the end of one layer.

    The layer is the first with attention and an MLP; it takes the first one's place meanwhile.
    Where a module cannot run without values, what was seen before it remains.
    """
    calls = Calls(layer=_representative(layers))
    handles: list[Any] = []
    kept: list[Any] = []  # so that no identity is used twice
    chosen = layers[calls.layer]

    def outside(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            calls.before.append(name)

        return hook

    def inside(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given, made = _first_tensor([*args, *kwargs.values()]), _first_tensor(output)
            kept.extend((given, made))
            calls.inside.setdefault(name, (_identity(given), _identity(made)))

        return hook

    def begin(layer: nn.Module, args: Any, kwargs: Any) -> None:
        given = _first_tensor([*args, *kwargs.values()])
        kept.append(given)
        calls.first = _identity(given)
        for handle in early:
            handle.remove()

    def end(layer: nn.Module, args: Any, output: Any) -> None:
        raise _Ended

    within = {id(module) for module in layers.modules()}
    early = [
        module.register_forward_pre_hook(outside(name))
        for name, module in model.named_modules()
        if name and id(module) not in within
    ]
    handles += early
    for name, module in chosen.named_modules():
        if name:
            handles.append(module.register_forward_hook(inside(name), with_kwargs=True))
    handles.append(chosen.register_forward_pre_hook(begin, with_kwargs=True))
    handles.append(chosen.register_forward_hook(end))
    original = layers[0]
    layers[0] = chosen
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it reports what is caught here
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            ids = torch.zeros((1, 4), dtype=torch.long, device="meta")
            model(input_ids=ids, use_cache=False)
    except Exception:  # values were asked for, or the end was reached
        pass
    finally:
        layers[0] = original
        log.setLevel(level)
        for handle in handles:
            handle.remove()
    return calls


def _first_tensor(values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        return values
    if isinstance(values, Mapping):
        values = values.values()
    items = values if isinstance(values, Iterable) and not isinstance(values, str) else ()
    return next((item for item in items if isinstance(item, torch.Tensor)), None)


def _identity(tensor: Any) -> int:
    """Views of one tensor have one identity: reshaping is not computing."""
    return 0 if tensor is None else int(tensor.untyped_storage()._cdata)


def _representative(layers: nn.ModuleList) -> int:
    for index, layer in enumerate(layers):
        names = [name for name, _ in layer.named_modules()]
        if any(_QUERY.search(n) or _FUSED.search(n) for n in names):
            return index
    return 0


def layer_roles(layers: nn.ModuleList, calls: Calls, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a row that lie inside a layer.

    A role that only some layers have stays empty, but for the two kinds of MLP of a mixture.
    """
    roles: dict[str, Any] = dict(_EMPTY)
    shapes = [_projections(layer) for layer in layers]
    attentions = {tuple(sorted(_attention(found).items())) for found in shapes}
    if len(attentions) == 1:
        roles.update(dict(attentions.pop()))
    mlps = {
        tuple(sorted(_mlp(layer, found).items()))
        for layer, found in zip(layers, shapes, strict=True)
    }
    roles.update(_merged(mlps))
    roles.update(_norms(layers[calls.layer], calls, roles))
    layer = layers[calls.layer]
    output = _get(layer, f"{roles['attention']}.{roles['output']}" if roles["output"] else "")
    roles["transposed"] = type(output).__name__ == "Conv1D"
    roles["intermediate_key"] = _intermediate_key(roles, layers, entries)
    roles["fixed_heads"] = _fixed_heads(roles, layers, entries)
    roles["fixed_channels"] = _fixed_channels(roles, layers)
    return roles


def _get(layer: nn.Module, path: str) -> Any:
    try:
        return layer.get_submodule(path) if path else None
    except AttributeError:
        return None


def _projections(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """Return path -> (inputs, outputs) of each projection of a layer."""
    found = {}
    for name, module in layer.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
            continue
        rows, columns = weight.shape
        found[name] = (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)
    return found


LATENT: Mapping[str, tuple[str, ...]] = {
    "q": ("q_proj", "q_a_proj", "q_b_proj"),
    **dict.fromkeys(("k", "v"), ("kv_a_proj_with_mqa", "kv_a_proj", "kv_b_proj")),
}
"""Names of the low-rank projections of latent attention."""


def projections_of(layer: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the projections of one layer, whatever others have: role of a recipe -> paths."""
    shapes = _projections(layer)
    attention, mlp = _attention(shapes), _mlp(layer, shapes)
    names = {"q": "query", "k": "key", "v": "value", "o": "output"}
    found: dict[str, tuple[str, ...]] = {}
    for role, key in names.items():
        own = attention.get(key) or (attention.get("fused_qkv") if role != "o" else None)
        paths = (own,) if own else LATENT.get(role, ())
        found[role] = tuple(
            path for each in paths if (path := f"{attention.get('attention')}.{each}") in shapes
        )
    for role in ("gate", "up", "down"):
        name = mlp.get(role) or (mlp.get("fused_gate_up") if role != "down" else None)
        found[role] = (f"{mlp['mlp']}.{name}" if mlp["mlp"] else name,) if name else ()
    return found


def _attention(shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    names = [name for name in shapes if _ATTENTION.search(name) and "cross" not in name]
    parts = {
        "query": [n for n in names if _QUERY.search(n)],
        "key": [n for n in names if _KEY.search(n)],
        "value": [n for n in names if _VALUE.search(n)],
        "fused_qkv": [n for n in names if _FUSED.search(n)],
        "output": [n for n in names if _OUTPUT.search(n)],
    }
    if len(parts["output"]) != 1 or any(len(found) > 1 for found in parts.values()):
        return {}
    split = all(len(parts[key]) == 1 for key in ("query", "key", "value"))
    if not split:
        parts.update(query=[], key=[], value=[])
    used = [found[0] for found in parts.values() if found]
    root = _common(used)
    if len(used) == 1:  # low-rank projections, which share no one query
        root = used[0].rpartition(".")[0]
    if not root:
        return {}
    inside = {key: found[0][len(root) + 1 :] for key, found in parts.items() if found}
    return {"attention": root, **inside}


def _common(paths: list[str]) -> str:
    parts = [path.split(".")[:-1] for path in paths]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _mlp(layer: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    roots = [
        name
        for name, module in layer.named_children()
        if _MLP.search(name) and not _ATTENTION.search(name) and "norm" not in name
        if any(True for _ in module.parameters())
    ]
    root = roots[0] if len(roots) == 1 else ""
    if len(roots) > 1:
        return {}
    start = f"{root}." if root else ""
    found: dict[str, str] = {"mlp": root}
    if root:
        module = layer.get_submodule(root)
        children = dict(module.named_children())
        expert = [n for n in children if n.endswith("experts") and "shared" not in n]
        router = [n for n in children if n in ("router", "gate", "gating")]
        if expert and router:
            return {**found, "experts": expert[0], "router": router[0]}
    dense = {
        name[len(start) :]: shape
        for name, shape in shapes.items()
        if name.startswith(start)
        and not _NOT_MLP.search(name[len(start) :])
        and not (_ATTENTION.search(name) and not root)
    }
    return {**found, **_plain_mlp(dense)} if dense else {}


def _plain_mlp(shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Tell gate, up and down apart by their shapes, and gate from up by its name."""
    for down, (inner, hidden) in reversed(list(shapes.items())):
        others = {n: s for n, s in shapes.items() if n != down and s[0] == hidden}
        as_wide = [n for n, s in others.items() if s[1] == inner]
        doubled = [n for n, s in others.items() if s[1] == 2 * inner]
        if len(others) != len(shapes) - 1:
            continue
        if len(doubled) == 1 and not as_wide:
            return {"fused_gate_up": doubled[0], "down": down}
        if len(as_wide) == 1 and not doubled:
            return {"up": as_wide[0], "down": down}
        gates = [n for n in as_wide if _GATE.search(n)]
        if len(as_wide) == 2 and len(gates) == 1:
            up = next(n for n in as_wide if n not in gates)
            return {"gate": gates[0], "up": up, "down": down}
    return {}


def _merged(found: Iterable[tuple[tuple[str, str], ...]]) -> dict[str, str]:
    """Join the kinds of MLP of all layers: those of a mixture, and dense ones."""
    kinds = [dict(each) for each in found]
    if not all(kinds) or len({each.get("mlp") for each in kinds}) != 1:
        return {}
    merged: dict[str, str] = {}
    for kind in kinds:
        if any(merged.get(key, value) != value for key, value in kind.items()):
            return {}
        merged.update(kind)
    return merged


def _norms(layer: nn.Module, calls: Calls, roles: Mapping[str, str]) -> dict[str, Any]:
    """Tell norms apart by the tensors that they were given and gave."""
    attention = calls.inside.get(roles["attention"])
    mlp = calls.inside.get(roles["mlp"]) if roles["mlp"] else None
    entrance = roles["up"] or roles["fused_gate_up"]
    if mlp is None and not roles["mlp"] and entrance in calls.inside:
        mlp = (calls.inside[entrance][0], calls.inside[roles["down"]][1])
    if mlp is None and roles["mlp"]:
        mlp = _began(calls, roles)
    if attention is None or mlp is None:
        return {}
    found: dict[str, Any] = {}
    inner = tuple(f"{path}." for path in (roles["attention"], roles["mlp"]) if path)
    for name, (given, made) in calls.inside.items():
        if "norm" not in f"{name} {type(layer.get_submodule(name))}".lower() or name.startswith(
            inner
        ):
            continue
        if made == attention[0]:
            found["input_norm"] = name
        if made == mlp[0] and made != attention[0]:
            found["mlp_norm"] = name
        if given == attention[1]:
            found["attention_output_norm"] = name
        if given == mlp[1] and mlp[1]:
            found["mlp_output_norm"] = name
    if found.get("attention_output_norm") == found.get("mlp_norm"):
        found.pop("attention_output_norm", None)  # attention adds its input by itself (Bloom)
    own = found.get("mlp_norm", "")
    source = calls.inside[own][0] if own else mlp[0]
    found["parallel_residual"] = source in (calls.first, attention[0]) and source != 0
    return found


def _began(calls: Calls, roles: Mapping[str, str]) -> tuple[int, int] | None:
    """What an MLP was given that did not come to its end: its first module was given the same."""
    start = f"{roles['mlp']}."
    return next(((s[0], 0) for n, s in calls.inside.items() if n.startswith(start)), None)


def _intermediate_key(
    roles: Mapping[str, str], layers: nn.ModuleList, entries: Mapping[str, Any]
) -> str:
    path = ".".join(part for part in (roles["mlp"], roles["down"]) if part)
    layer = next((each for each in layers if roles["down"] and _get(each, path) is not None), None)
    if layer is not None:
        sizes = {_projections(layer)[path][0]}
    else:
        experts = (
            _get(layers[0], f"{roles['mlp']}.{roles['experts']}") if roles["experts"] else None
        )
        sizes = {n for p in experts.parameters() for n in p.shape[1:]} if experts else set()
    sized = [key for key, value in entries.items() if isinstance(value, int) and value in sizes]
    names = [key for key in sized if re.search("inter|inner|ff", key)]
    if not names and layer is not None:  # an absent entry means four times the hidden size
        unset = [k for k, v in entries.items() if v is None and re.search("^n_inner$|^inter", k)]
        names = unset if sizes == {4 * _projections(layer)[path][1]} else []
    return min(names, key=lambda name: (name != "intermediate_size", name), default="")


def _fixed_heads(
    roles: Mapping[str, str], layers: nn.ModuleList, entries: Mapping[str, Any]
) -> str:
    """Say why heads cannot be removed, though the projections are known."""
    if not (roles["attention"] and roles["query"]):
        return ""
    attention = layers[0].get_submodule(roles["attention"])
    heads = entries.get("num_attention_heads")
    size = entries.get("head_dim") or (
        entries.get("hidden_size", 0) // heads if isinstance(heads, int) and heads else 0
    )
    known = {roles[key] for key in ("query", "key", "value", "output")}
    for name, parameter in attention.named_parameters():
        module = name.rpartition(".")[0]
        if module not in known and parameter.shape != (size,):
            return (
                f"its attention has a further weight, '{name}', and it is not known which part of "
                "it goes with which head"
            )
    return ""


def _fixed_channels(roles: Mapping[str, str], layers: nn.ModuleList) -> str:
    """Say why channels of an MLP cannot be removed, though the projections are known."""
    if not (roles["mlp"] and roles["down"]) or roles["experts"]:
        return ""
    known = {roles[key] for key in ("gate", "up", "down", "fused_gate_up")}
    for name, _ in layers[0].get_submodule(roles["mlp"]).named_parameters():
        if name.rpartition(".")[0] not in known:
            return (
                f"its MLPs have a further weight, '{name}', and it is not known which part of it "
                "goes with which channel"
            )
    return ""
