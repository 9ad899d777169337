"""A residual stream that was rotated and sliced: config entry ``rotations``, and its layers.

SliceGPT (arXiv 2401.15024, section 3) turns the stream between every two sub-layers into the basis
of its principal axes and keeps the first of them. Input and output of a sub-layer then have
different bases and widths, so that each residual connection needs a shortcut matrix.

As with attached networks, a layer's class is replaced with a subclass of its own class: attention
stays the host's, and so do caches, hooks and gradient checkpointing. Only the sums change::

    middle = shortcut(input) + attention(norm(input))
    output = shortcut(middle) + mlp(norm(middle))

The norms have lost their weights to the linear maps behind them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import Architecture, architecture_of, config_entry
from streamline_bench.errors import ArchitectureError, CheckpointError
from streamline_bench.modeling.attachments import host_layer_class

_PREFIX = "Rotated"
_classes: dict[type[nn.Module], type[nn.Module]] = {}


@dataclass(frozen=True)
class StreamWidths:
    """Widths of the stream in one layer: before attention, between attention and MLP, after it."""

    input: int
    middle: int
    output: int


@dataclass(frozen=True)
class Rotations:
    """Widths of the stream throughout a model.

    Attributes:
        layers: one item per decoder layer. The embeddings are as wide as the first layer's input,
            the LM head as the last layer's output.
        norm_divisor: what the weightless norms divide the sum of squares by: the width that the
            stream had before it was sliced, because the axes cut off count as zeros.
        head_bias: the LM head has a bias, into which the final norm's was folded.
    """

    layers: tuple[StreamWidths, ...]
    norm_divisor: int
    head_bias: bool = False

    @classmethod
    def uniform(
        cls, depth: int, width: int, *, norm_divisor: int, head_width: int, head_bias: bool = False
    ) -> Rotations:
        """Return the form of the paper: one width everywhere, another one before the LM head."""
        inner = [StreamWidths(width, width, width)] * (depth - 1)
        return cls((*inner, StreamWidths(width, width, head_width)), norm_divisor, head_bias)

    @classmethod
    def parse(cls, entry: Any, config: Any) -> Rotations:
        """Validate the entry of a config.

        Raises:
            CheckpointError: a key is missing or unknown, a width is not a positive whole number, or
                the widths of two layers do not meet.
            ArchitectureError: the family cannot have a rotated stream.
        """
        require_rotatable(config)
        if isinstance(entry, Rotations):
            entry = entry.to_dict()
        expected = {"layers", "norm_divisor", "head_bias"}
        if not isinstance(entry, Mapping) or set(entry) != expected:
            raise CheckpointError(
                f"The config's rotations {str(entry)[:80]} are not understood; they need exactly "
                f"{sorted(expected)}."
            )
        layers = tuple(_layer(item) for item in entry["layers"])
        if len(layers) != int(config.num_hidden_layers):
            raise CheckpointError(
                f"The config's rotations list {len(layers)} layers, the model has "
                f"{config.num_hidden_layers}; write the checkpoint again."
            )
        for index, (left, right) in enumerate(itertools.pairwise(layers)):
            if left.output != right.input:
                raise CheckpointError(
                    f"The config's rotations give layer {index} an output of width {left.output}, "
                    f"the next layer an input of {right.input}; write the checkpoint again."
                )
        return cls(layers, _width(entry["norm_divisor"]), bool(entry["head_bias"]))

    @property
    def embedding_width(self) -> int:
        """Width of the embeddings."""
        return self.layers[0].input

    @property
    def head_width(self) -> int:
        """Width of the LM head's input."""
        return self.layers[-1].output

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that the config holds."""
        return {
            "layers": [asdict(widths) for widths in self.layers],
            "norm_divisor": self.norm_divisor,
            "head_bias": self.head_bias,
        }


def require_rotatable(config: Any) -> Architecture:
    """Return the table row of a config whose residual stream may be rotated.

    A rotation passes through a layer only where every norm stands right before linear maps, which
    take its gain, and attention and MLP follow one another.

    Raises:
        ArchitectureError: the family, or a setting of this model, does not allow it.
    """
    row = architecture_of(config)
    reason = _structural_reason(row) or _reason_in(config)
    if reason:
        raise ArchitectureError(
            f"The residual stream of this '{row.model_type}' model cannot be rotated and sliced: "
            f"{reason}; choose a depth method or another model."
        )
    return row


def _structural_reason(row: Architecture) -> str:
    if row.output_norms:
        return (
            "it has norms between a sub-layer's output and the stream, and no linear map follows "
            "that could take their gain"
        )
    if row.parallel_residual:
        return "its attention and MLP read the same input, so that nothing can turn between them"
    if row.experts:
        return "its MLPs are mixtures of experts, which are not supported"
    if row.transposed:
        return "its projections store their weights as [in, out]"
    return ""


def _reason_in(config: Any) -> str:
    if config_entry(config, "do_layer_norm_before", True) is False:
        return "do_layer_norm_before=False puts its norms behind the residual sums"
    embedded, hidden = (config_entry(config, k) for k in ("word_embed_proj_dim", "hidden_size"))
    if embedded is not None and embedded != hidden:
        return (
            f"word_embed_proj_dim={embedded} differs from hidden_size={hidden}, so that a "
            "projection stands between embeddings and stream"
        )
    return ""


def _layer(item: Any) -> StreamWidths:
    if not isinstance(item, Mapping) or set(item) != {"input", "middle", "output"}:
        raise CheckpointError(
            f"The widths {item!r} of a layer are not valid; give exactly input, middle and output."
        )
    return StreamWidths(**{name: _width(value) for name, value in item.items()})


def _width(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{value!r} in the config's rotations must be a whole number from 1.")
    return value


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
    for layer, widths in zip(stack.get_submodule(_layers(row)), rotations.layers, strict=True):
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
    for layer in stack.get_submodule(_layers(row)):
        _replace_norm(layer, row.input_norm, divisor)
        _replace_norm(layer, row.mlp_norm, divisor)


def stack_of(model: nn.Module, row: Architecture) -> Any:
    """Return the module that owns embeddings, layers and final norm, with or without LM head."""
    inner = row.stack.removeprefix(row.base).removeprefix(".")
    return getattr(model, row.base, model).get_submodule(inner)


def stream_embeddings(model: nn.Module, row: Architecture) -> list[Any]:
    """Return the embeddings that write to the stream (of tokens and, where learned, positions)."""
    stack = stack_of(model, row)
    found = (_optional(stack, path.removeprefix(f"{row.stack}.")) for path in row.embeddings)
    return [embedding for embedding in found if embedding is not None]


def output_maps(layer: nn.Module, row: Architecture) -> tuple[Any, Any]:
    """Return the linear maps by which attention and MLP of a layer write to the stream."""
    attention, mlp = layer.get_submodule(row.attention), layer.get_submodule(row.mlp)
    return attention.get_submodule(row.output), mlp.get_submodule(row.down)


def attention_inputs(layer: nn.Module, row: Architecture) -> list[Any]:
    """Return the linear maps of a layer's attention that read the stream."""
    attention = layer.get_submodule(row.attention)
    return _present(attention, (row.query, row.key, row.value, row.fused_qkv))


def mlp_inputs(layer: nn.Module, row: Architecture) -> list[Any]:
    """Return the linear maps of a layer's MLP that read the stream."""
    return _present(layer.get_submodule(row.mlp), (row.gate, row.up, row.fused_gate_up))


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
        normed = self.get_submodule(row.input_norm)(hidden_states)
        attended = self.get_submodule(row.attention)(hidden_states=normed, **kwargs)[0]
        shortcut: Tensor = self.attention_shortcut(hidden_states)
        return shortcut + _dropped(self, attended, "resid_attn_dropout")

    return attend


def _make_feed(row: Architecture) -> Any:
    def feed(self: Any, middle: Tensor) -> Tensor:
        """Run the MLP: ``[batch, seq, middle]`` -> ``[batch, seq, output]``."""
        normed = self.get_submodule(row.mlp_norm)(middle)
        if row.mlp:
            fed = self.get_submodule(row.mlp)(normed)
        else:
            inner = self.activation_fn(self.get_submodule(row.up)(normed))
            fed = self.get_submodule(row.down)(inner)
        shortcut: Tensor = self.mlp_shortcut(middle)
        return shortcut + _dropped(self, fed, "resid_mlp_dropout")

    return feed


def _dropped(layer: Any, hidden: Tensor, module: str) -> Tensor:
    """Apply the host's dropout of a sub-layer's output, a module or a rate, where it has one."""
    if module in layer._modules:
        return layer._modules[module](hidden)  # type: ignore[no-any-return]
    return nn.functional.dropout(hidden, getattr(layer, "dropout", 0.0), layer.training)


def _replace_norm(parent: nn.Module, path: str, divisor: int) -> None:
    norm: Any = parent.get_submodule(path)
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
    return [module.get_submodule(name) for name in names if name]


def _optional(module: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return module.get_submodule(parent)._modules.get(name)


def __getattr__(name: str) -> Any:
    if name.startswith(_PREFIX):
        return rotated_layer_class(*host_layer_class(name.removeprefix(_PREFIX)))
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
