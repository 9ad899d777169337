"""Decoder layers whose residual connections go through shortcut matrices.

As with attached networks, a layer's class is replaced with a subclass of its own class: attention
stays the host's, and so do caches, hooks and gradient checkpointing. Only the sums change::

    middle = shortcut(input) + attention(norm(input))
    output = shortcut(middle) + mlp(norm(middle))

The norms have lost their weights to the linear maps behind them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import Architecture, architecture_of
from streamline_bench.core.architecture import get_submodule as at
from streamline_bench.modeling.attachments import host_layer_class
from streamline_bench.modeling.rotations import Rotations

_PREFIX = "Rotated"
_classes: dict[type[nn.Module], type[nn.Module]] = {}


class StreamNorm(nn.Module):
    """``x / sqrt(sum(x²) / divisor + eps)``, without weights.

    The sum runs over the axes kept; the divisor is the width before slicing, as if the others were
    zero. Computed in float32 at least; input and output ``[..., width]``.
    """

    def __init__(self, divisor: int, eps: float) -> None:
        super().__init__()
        self.divisor = divisor
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the normalised states, in their own dtype."""
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        squares = wide.square().sum(-1, keepdim=True) / self.divisor
        return (wide * torch.rsqrt(squares + self.eps)).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return f"divisor={self.divisor}, eps={self.eps}"


def rotated_layer_class(host_class: type[nn.Module], row: Architecture) -> type[nn.Module]:
    """Return (making it on first use) the subclass of a decoder layer class with shortcuts."""
    if host_class not in _classes:
        name = _PREFIX + host_class.__name__
        namespace = {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{host_class.__name__} on a rotated residual stream.",
            "attend": _make_attend(row),
            "feed": _make_feed(row),
            "forward": _forward,
        }
        _classes[host_class] = type(name, (host_class,), namespace)
    return _classes[host_class]


def rotate_layer_class(layer: nn.Module, row: Architecture) -> None:
    """Make ``layer`` run on a rotated stream, in place; its shortcuts pass their input on."""
    layer.__class__ = rotated_layer_class(type(layer), row)
    layer.add_module("attention_shortcut", nn.Identity())
    layer.add_module("mlp_shortcut", nn.Identity())


def set_shortcut(layer: nn.Module, name: str, weight: Tensor) -> None:
    """Let the shortcut ``name`` of a layer multiply with ``weight`` ``[out, in]``."""
    shortcut = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    shortcut.weight = nn.Parameter(weight)
    layer.add_module(name, shortcut)


def rotate_modules(model: nn.Module, rotations: Rotations) -> None:
    """Give a freshly built host model the widths of ``rotations``; resized weights are not set.

    Args:
        model: causal LM or bare decoder stack of a family that is rotatable.
    """
    row = architecture_of(model.config)
    stack = stack_of(model, row)
    for embedding in stream_embeddings(model, row):
        _resize(embedding, embedding.weight.shape[0], rotations.embedding_width)
    replace_norms(model, rotations.norm_divisor)
    for layer, widths in zip(at(stack, _layers(row)), rotations.layers, strict=True):  # type: ignore[call-overload]
        rotate_layer_class(layer, row)
        like = attention_inputs(layer, row)[0].weight
        inner, outer = (widths.middle, widths.input), (widths.output, widths.middle)
        set_shortcut(layer, "attention_shortcut", like.new_empty(inner))
        set_shortcut(layer, "mlp_shortcut", like.new_empty(outer))
        for linear in attention_inputs(layer, row):
            _resize(linear, linear.weight.shape[0], widths.input)
        attention_output, mlp_output = output_maps(layer, row)
        _resize(attention_output, widths.middle, None)
        for linear in mlp_inputs(layer, row):
            _resize(linear, linear.weight.shape[0], widths.middle)
        _resize(mlp_output, widths.output, None)
    head = _optional(model, row.lm_head)
    if head is not None:
        _resize(head, head.weight.shape[0], rotations.head_width)
        if rotations.head_bias:
            head.bias = nn.Parameter(head.weight.new_empty(head.weight.shape[0]))


def replace_norms(model: nn.Module, divisor: int) -> None:
    """Put a :class:`StreamNorm` with the same epsilon in the place of every norm of the stream."""
    row = architecture_of(model.config)
    stack = stack_of(model, row)
    _replace_norm(stack, row.final_norm.removeprefix(f"{row.stack}."), divisor)
    for layer in at(stack, _layers(row)):  # type: ignore[attr-defined]
        _replace_norm(layer, row.input_norm, divisor)
        _replace_norm(layer, row.mlp_norm, divisor)


def stack_of(model: nn.Module, row: Architecture) -> Any:
    """Return the module that owns embeddings, layers and final norm, with or without LM head."""
    inner = row.stack.removeprefix(row.base).removeprefix(".")
    return at(getattr(model, row.base, model), inner)


def stream_embeddings(model: nn.Module, row: Architecture) -> list[Any]:
    """Return the embeddings that write to the stream (of tokens and, where learned, positions)."""
    stack = stack_of(model, row)
    found = (_optional(stack, path.removeprefix(f"{row.stack}.")) for path in row.embeddings)
    return [embedding for embedding in found if embedding is not None]


def output_maps(layer: nn.Module, row: Architecture) -> tuple[Any, Any]:
    """Return the linear maps by which attention and MLP of a layer write to the stream."""
    return at(at(layer, row.attention), row.output), at(at(layer, row.mlp), row.down)


def attention_inputs(layer: nn.Module, row: Architecture) -> list[Any]:
    """Return the linear maps of a layer's attention that read the stream."""
    attention = at(layer, row.attention)
    return _present(attention, (row.query, row.key, row.value, row.fused_qkv))


def mlp_inputs(layer: nn.Module, row: Architecture) -> list[Any]:
    """Return the linear maps of a layer's MLP that read the stream."""
    return _present(at(layer, row.mlp), (row.gate, row.up, row.fused_gate_up))


def set_weight(module: Any, weight: Tensor) -> None:
    """Replace the weight of a linear map or an embedding, of any shape, in place."""
    module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    if isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    else:
        module.out_features, module.in_features = weight.shape


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return self.feed(self.attend(hidden_states, *args, **kwargs))  # type: ignore[no-any-return]


def _make_attend(row: Architecture) -> Any:
    def attend(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run attention: ``[batch, seq, input]`` -> ``[batch, seq, middle]``."""
        if args:  # the hosts of transformers 5 pass all but the states by name
            kwargs["attention_mask"] = args[0]
        normed = at(self, row.input_norm)(hidden_states)
        attended = at(self, row.attention)(hidden_states=normed, **kwargs)[0]
        shortcut: Tensor = self.attention_shortcut(hidden_states)
        return shortcut + _dropped(self, attended, "resid_attn_dropout")

    return attend


def _make_feed(row: Architecture) -> Any:
    def feed(self: Any, middle: Tensor) -> Tensor:
        """Run the MLP: ``[batch, seq, middle]`` -> ``[batch, seq, output]``."""
        normed = at(self, row.mlp_norm)(middle)
        if row.mlp:
            fed = at(self, row.mlp)(normed)
        else:
            fed = at(self, row.down)(self.activation_fn(at(self, row.up)(normed)))
        shortcut: Tensor = self.mlp_shortcut(middle)
        return shortcut + _dropped(self, fed, "resid_mlp_dropout")

    return feed


def _dropped(layer: Any, hidden: Tensor, module: str) -> Tensor:
    """Apply the host's dropout of a sub-layer's output, a module or a rate, where it has one."""
    if module in layer._modules:
        return layer._modules[module](hidden)  # type: ignore[no-any-return]
    return nn.functional.dropout(hidden, getattr(layer, "dropout", 0.0), layer.training)


def _replace_norm(parent: nn.Module, path: str, divisor: int) -> None:
    norm: Any = at(parent, path)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    parent.set_submodule(path, StreamNorm(divisor, eps))


def _resize(module: Any, rows: int, columns: int | None) -> None:
    size = (rows, module.weight.shape[1] if columns is None else columns)
    bias = getattr(module, "bias", None)
    if bias is not None and len(bias) != rows:
        module.bias = nn.Parameter(bias.new_empty(rows))
    if module.weight.shape != size:
        set_weight(module, module.weight.new_empty(size))
    # transformers then initialises it again (from_config) or fills it from the file.
    module._is_hf_initialized = False


def _layers(row: Architecture) -> str:
    return row.layers.removeprefix(f"{row.stack}.")


def _present(module: nn.Module, names: Iterable[str]) -> list[Any]:
    return [at(module, name) for name in names if name]


def _optional(module: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return at(module, parent)._modules.get(name)


def __getattr__(name: str) -> Any:
    if name.startswith(_PREFIX):
        return rotated_layer_class(*host_layer_class(name.removeprefix(_PREFIX)))
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
