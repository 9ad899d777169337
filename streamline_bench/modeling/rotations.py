"""A residual stream that was rotated and sliced: config entry ``rotations``, and its layers.

SliceGPT (arXiv 2401.15024, section 3) turns the stream between every two sub-layers into the basis
of its principal axes and keeps the first of them. Input and output of a sub-layer then have
different bases and widths, so that each residual connection needs a shortcut matrix.

As with attached networks, a layer's class is replaced with a subclass of its own class: attention
stays the host's, and so do caches, hooks and gradient checkpointing. Only the sums change::

    middle = shortcut(input) + attention(norm(input))
    output = shortcut(middle) + mlp(norm(middle))

The norms have lost their weights to the linear maps behind them.

Where attention and MLP of a layer read the same input, there is no point between them and one
shortcut::

    output = shortcut(input) + attention(norm(input)) + mlp(norm(input))
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamline_bench.core.architecture import (
    Architecture,
    architecture_of,
    config_entry,
    depth_of,
    undecided,
)
from streamline_bench.errors import ArchitectureError, CheckpointError
from streamline_bench.modeling.attachments import host_layer_class

_PREFIX = "Rotated"
_classes: dict[type[nn.Module], type[nn.Module]] = {}


@dataclass(frozen=True)
class StreamWidths:
    """Widths of the stream in one layer: before attention, between attention and MLP, after it.

    Attention and MLP that read the same input write to the same output: ``middle`` is the output's.
    """

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
        cls,
        depth: int,
        width: int,
        *,
        norm_divisor: int,
        head_width: int,
        head_bias: bool = False,
        parallel: bool = False,
    ) -> Rotations:
        """Return the form of the paper: one width everywhere, another one before the LM head."""
        inner = [StreamWidths(width, width, width)] * (depth - 1)
        last = StreamWidths(width, head_width if parallel else width, head_width)
        return cls((*inner, last), norm_divisor, head_bias)

    @classmethod
    def parse(cls, entry: Any, config: Any) -> Rotations:
        """Validate the entry of a config.

        Raises:
            CheckpointError: a key is missing or unknown, a width is not a positive whole number, or
                the widths of two layers do not meet.
            ArchitectureError: the family cannot have a rotated stream.
        """
        row = require_rotatable(config)
        if isinstance(entry, Rotations):
            entry = entry.to_dict()
        expected = {"layers", "norm_divisor", "head_bias"}
        if not isinstance(entry, Mapping) or set(entry) != expected:
            raise CheckpointError(
                f"The config's rotations {str(entry)[:80]} are not understood; they need exactly "
                f"{sorted(expected)}."
            )
        layers = tuple(_layer(item) for item in entry["layers"])
        if len(layers) != depth_of(config):
            raise CheckpointError(
                f"The config's rotations list {len(layers)} layers, the model has "
                f"{depth_of(config)}; write the checkpoint again."
            )
        for index, (left, right) in enumerate(itertools.pairwise(layers)):
            if left.output != right.input:
                raise CheckpointError(
                    f"The config's rotations give layer {index} an output of width {left.output}, "
                    f"the next layer an input of {right.input}; write the checkpoint again."
                )
        _check_family(row, config, layers)
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
    take its gain.

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
    if row.experts:
        return "its MLPs are mixtures of experts, which are not supported"
    if not row.attention:
        return "it is not known which of its modules are its attention"
    return undecided(row, "input_norm", "query", "output", "up", "down")


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


def _check_family(row: Architecture, config: Any, layers: tuple[StreamWidths, ...]) -> None:
    for index, widths in enumerate(layers if row.is_parallel(config) else ()):
        if widths.middle != widths.output:
            raise CheckpointError(
                f"The config's rotations give layer {index} a middle of {widths.middle} and an "
                f"output of {widths.output}; attention and MLP of this family read the same input, "
                "so that the two must be equal; write the checkpoint again."
            )
    if row.embedding_output and layers[-1].output < layers[0].input:
        raise CheckpointError(
            f"The config's rotations give the embeddings a width of {layers[0].input} and the LM "
            f"head {layers[-1].output}; this family needs an LM head at least as wide; write the "
            "checkpoint again."
        )


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
            "attend": _make_attend(row, host_class),
            "feed": _make_feed(row),
            "forward": _forward,
        }
        _classes[host_class] = type(name, (host_class,), namespace)
    return _classes[host_class]


def rotate_layer_class(layer: nn.Module, row: Architecture, *, parallel: bool = False) -> None:
    """Make ``layer`` run on a rotated stream, in place; its shortcuts pass their input on.

    Args:
        parallel: attention and MLP read the same input: there is one shortcut, past both.
    """
    layer.__class__ = rotated_layer_class(type(layer), row)
    layer.stream_width = None  # type: ignore[assignment]  # all there is
    layer.add_module("attention_shortcut", nn.Identity())
    if not parallel:
        layer.add_module("mlp_shortcut", nn.Identity())


def set_shortcut(layer: Any, name: str, weight: Tensor) -> None:
    """Let the shortcut ``name`` of a layer multiply with ``weight`` ``[out, in]``."""
    if name == "attention_shortcut":
        layer.stream_width = weight.shape[1]
    shortcut = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    shortcut.weight = nn.Parameter(weight)
    layer.add_module(name, shortcut)


def rotate_modules(model: nn.Module, rotations: Rotations) -> None:
    """Give a freshly built host model the widths of ``rotations``; resized weights are not set.

    Args:
        model: causal LM or bare decoder stack of a family that is rotatable.
    """
    row = architecture_of(model.config)
    stack, parallel = stack_of(model, row), row.is_parallel(model.config)
    for embedding in stream_embeddings(model, row):
        _resize(embedding, None, rotations.embedding_width)
    replace_norms(model, rotations.norm_divisor)
    for layer, widths in zip(stack.get_submodule(_layers(row)), rotations.layers, strict=True):
        rotate_layer_class(layer, row, parallel=parallel)
        like = attention_inputs(layer, row)[0].weight
        set_shortcut(layer, "attention_shortcut", like.new_empty(widths.middle, widths.input))
        if not parallel:
            set_shortcut(layer, "mlp_shortcut", like.new_empty(widths.output, widths.middle))
        for linear in attention_inputs(layer, row):
            _resize(linear, None, widths.input)
        attention_output, mlp_output = output_maps(layer, row)
        _resize(attention_output, widths.middle, None)
        for linear in mlp_inputs(layer, row):
            _resize(linear, None, widths.input if parallel else widths.middle)
        _resize(mlp_output, widths.output, None)
    head = _optional(model, row.lm_head)
    if head is not None:
        _resize(head, None, rotations.head_width)
        if rotations.head_bias:
            head.bias = nn.Parameter(head.weight.new_empty(head.weight.shape[0]))
    pad_embeddings(model, rotations.head_width)


class Padded(nn.Module):
    """A module whose output ``[..., n]`` gets zeros behind it, up to ``width``."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.width = width

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return ``[..., width]``."""
        output: Tensor = self.inner(hidden_states)
        return nn.functional.pad(output, (0, self.width - output.shape[-1]))


def pad_embeddings(model: nn.Module, head_width: int) -> None:
    """Let the first layer get states as wide as the last ones, where the family asks for that.

    The layer reads the part that it has use for. Needed where the model gives its last states the
    shape of the first (:attr:`Architecture.embedding_output`); in place.
    """
    row = architecture_of(model.config)
    if not row.embedding_output:
        return
    stack = stack_of(model, row)
    path = row.embedding_output.removeprefix(f"{row.stack}.")
    module = stack.get_submodule(path)
    inner = module.inner if isinstance(module, Padded) else module
    stack.set_submodule(path, Padded(inner, head_width))


def replace_norms(model: nn.Module, divisor: int) -> None:
    """Put a :class:`StreamNorm` with the same epsilon in the place of every norm of the stream."""
    row = architecture_of(model.config)
    stack: Any = stack_of(model, row)
    replace_final_norm(model, divisor)
    for layer in stack.get_submodule(_layers(row)):
        replace_layer_norms(layer, row, divisor)


def replace_final_norm(model: nn.Module, divisor: int) -> None:
    """Do what :func:`replace_norms` does with the norm before the LM head."""
    row = architecture_of(model.config)
    _replace_norm(stack_of(model, row), row.final_norm.removeprefix(f"{row.stack}."), divisor)


def replace_layer_norms(layer: nn.Module, row: Architecture, divisor: int) -> None:
    """Do what :func:`replace_norms` does with the norms of one layer."""
    _replace_norm(layer, row.input_norm, divisor)
    if row.mlp_norm:
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


def weight_of(module: Any) -> Tensor:
    """Return a view of the weight of a linear map, ``[out, in]``, or of an embedding."""
    weight: Tensor = module.weight
    return weight.T if isinstance(module, Conv1D) else weight


def set_weight(module: Any, weight: Tensor) -> None:
    """Replace the weight of a linear map ``[out, in]`` or of an embedding, of any shape, in place.

    GPT-2's ``Conv1D`` keeps it as ``[in, out]``.
    """
    stored = weight.T.contiguous() if isinstance(module, Conv1D) else weight
    module.weight = nn.Parameter(stored, requires_grad=module.weight.requires_grad)
    if isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, Conv1D):
        module.nf, module.nx = weight.shape
    else:
        module.out_features, module.in_features = weight.shape


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    hidden_states = hidden_states[..., : self.stream_width]  # see pad_embeddings
    middle: Tensor = self.attend(hidden_states, *args, **kwargs)
    if "mlp_shortcut" not in self._modules:  # the shortcut past attention leads past both
        return middle + self.feed(hidden_states)  # type: ignore[no-any-return]
    return self.mlp_shortcut(middle) + self.feed(middle)  # type: ignore[no-any-return]


def _make_attend(row: Architecture, host_class: type[nn.Module]) -> Any:
    positional = tuple(inspect.signature(host_class.forward).parameters)[2:]

    def attend(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run attention and its shortcut: ``[batch, seq, input]`` -> ``[batch, seq, middle]``."""
        kwargs.update(zip(positional, args, strict=False))
        normed = self.get_submodule(row.input_norm)(hidden_states)
        attended = self.get_submodule(row.attention)(normed, **kwargs)[0]
        shortcut: Tensor = self.attention_shortcut(hidden_states)
        return shortcut + _dropped(self, attended, _ATTENTION_DROPOUTS)

    return attend


def _make_feed(row: Architecture) -> Any:
    def feed(self: Any, states: Tensor) -> Tensor:
        """Run the MLP without its shortcut: what it adds, ``[batch, seq, output]``."""
        normed = self.get_submodule(row.mlp_norm or row.input_norm)(states)
        if row.mlp:
            fed = self.get_submodule(row.mlp)(normed)
        else:
            inner = self.activation_fn(self.get_submodule(row.up)(normed))
            fed = self.get_submodule(row.down)(inner)
        return _dropped(self, fed, _MLP_DROPOUTS)

    return feed


_ATTENTION_DROPOUTS = ("resid_attn_dropout", "post_attention_dropout", "resid_dropout")
_MLP_DROPOUTS = ("resid_mlp_dropout", "post_mlp_dropout", "resid_dropout")


def _dropped(layer: Any, hidden: Tensor, modules: Iterable[str]) -> Tensor:
    """Apply the host's dropout of a sub-layer's output, a module or a rate, where it has one."""
    for name in modules:
        if name in layer._modules:
            return layer._modules[name](hidden)  # type: ignore[no-any-return]
    rate = getattr(layer, "dropout", 0.0)
    if isinstance(rate, nn.Module):
        return rate(hidden)  # type: ignore[no-any-return]
    return nn.functional.dropout(hidden, rate, layer.training)


def _replace_norm(parent: nn.Module, path: str, divisor: int) -> None:
    norm: Any = parent.get_submodule(path)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    parent.set_submodule(path, StreamNorm(divisor, eps))


def _resize(module: Any, rows: int | None, columns: int | None) -> None:
    """Give a weight ``[rows, columns]`` another size; None: as it is."""
    now = weight_of(module).shape
    size = (rows or now[0], columns or now[1])
    bias = getattr(module, "bias", None)
    if bias is not None and len(bias) != size[0]:
        module.bias = nn.Parameter(bias.new_empty(size[0]))
    if now != size:
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
