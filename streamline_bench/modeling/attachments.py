"""What hangs behind which decoder layer: the entries of ``config.attachments``.

An attachment is a network without attention. It is not a layer of its own: it runs right after
decoder layer ``after_layer`` (right before layer 0 for ``-1``). So ``num_hidden_layers`` counts
attention layers only, and key-value caches stay one to one with the layers.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from streamline_bench.core.architecture import (
    ARCHITECTURES,
    Architecture,
    architecture_of,
    depth_of,
)
from streamline_bench.core.recipe.schema import ReplacementSpec
from streamline_bench.core.recipe.validation import suggest
from streamline_bench.core.replacement import (
    NETWORK_KINDS,
    ReplacementNetwork,
    build_network,
    network_sizes,
)
from streamline_bench.errors import CheckpointError

BEFORE_FIRST = -1
"""``after_layer`` of a network that runs before layer 0 (the block began at layer 0)."""


@dataclass(frozen=True)
class Attachment:
    """One network and its place.

    Attributes:
        after_layer: index of the layer it runs behind; -1: before layer 0.
        kind: one of ``ffn``, ``swiglu``, ``ffn_res``, ``swiglu_res``, ``linear``.
        intermediate_size: inner width (the hidden size for ``linear``).
    """

    after_layer: int
    kind: str
    intermediate_size: int

    @classmethod
    def of(cls, spec: ReplacementSpec, config: Any, after_layer: int) -> Attachment:
        """Return the attachment of a recipe's replacement for a model with ``config``."""
        return cls(after_layer, spec.kind, network_sizes(spec, config)[1])

    def build(self, config: Any) -> ReplacementNetwork:
        """Build the network with fresh weights, in torch's default dtype and device."""
        spec = ReplacementSpec.model_validate(
            {"kind": self.kind, "intermediate_size": self.intermediate_size}
        )
        return build_network(spec, config)

    def tensor_prefix(self, config: Any) -> str:
        """Return the prefix of its tensors' names in a causal LM's checkpoint, with the dot."""
        layers = architecture_of(config).layers
        if self.after_layer == BEFORE_FIRST:
            return f"{layers}.0.prelude."
        return f"{layers}.{self.after_layer}.attachment."

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that the config holds."""
        return asdict(self)


def parse_attachments(entries: Iterable[Any], config: Any) -> tuple[Attachment, ...]:
    """Validate the entries of a config and order them by place.

    Raises:
        CheckpointError: an entry has an unknown kind or key, points outside the model, or shares
            its place with another.
    """
    depth = depth_of(config)
    parsed = sorted((_parse(entry, depth) for entry in entries), key=lambda a: a.after_layer)
    for left, right in itertools.pairwise(parsed):
        if left.after_layer == right.after_layer:
            raise CheckpointError(
                f"Two attachments share after_layer {left.after_layer}; each place takes one."
            )
    return tuple(parsed)


def _parse(entry: Any, depth: int) -> Attachment:
    fields = entry.to_dict() if isinstance(entry, Attachment) else entry
    expected = {"after_layer", "kind", "intermediate_size"}
    if not isinstance(fields, Mapping) or set(fields) != expected:
        raise CheckpointError(
            f"Attachment {fields!r} is not valid; give exactly {sorted(expected)}."
        )
    kind, place, width = fields["kind"], fields["after_layer"], fields["intermediate_size"]
    if kind not in NETWORK_KINDS:
        raise CheckpointError(f"Attachment kind '{kind}' is unknown{suggest(kind, NETWORK_KINDS)}")
    if not BEFORE_FIRST <= place < depth:
        raise CheckpointError(
            f"Attachment after_layer {place} is outside -1 .. {depth - 1} of this model."
        )
    if width < 1:
        raise CheckpointError(f"Attachment intermediate_size {width} must be at least 1.")
    return Attachment(int(place), str(kind), int(width))


_PREFIX = "Attached"
_classes: dict[type[nn.Module], type[nn.Module]] = {}


def attach_network(layer: nn.Module, network: ReplacementNetwork, *, before: bool) -> None:
    """Make ``layer`` run ``network`` on its input (``before``) or on its output, in place."""
    if type(layer) not in _classes.values():
        layer.__class__ = attached_layer_class(type(layer))
    layer.add_module("prelude" if before else "attachment", network)


def attached_layer_class(host_class: type[nn.Module]) -> type[nn.Module]:
    """Return (making it on first use) the subclass of a decoder layer class that runs networks."""
    if host_class not in _classes:
        name = _PREFIX + host_class.__name__
        namespace = {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{host_class.__name__} with a network before or after it.",
            "forward": _make_forward(host_class),
        }
        _classes[host_class] = type(name, (host_class,), namespace)
    return _classes[host_class]


def _make_forward(host_class: type[nn.Module]) -> Any:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        prelude = self._modules.get("prelude")
        if prelude is not None:
            if args:
                args = (prelude(args[0]), *args[1:])
            else:
                kwargs["hidden_states"] = prelude(kwargs["hidden_states"])
        output = host_class.forward(self, *args, **kwargs)
        attachment = self._modules.get("attachment")
        if attachment is None:
            return output
        if isinstance(output, (tuple, list)):  # families differ, and so do transformers' versions
            return type(output)((attachment(output[0]), *output[1:]))
        return attachment(output)

    return forward


def host_layer_class(name: str) -> tuple[type[nn.Module], Architecture]:
    """Return a family's class of that name and the family, to read a pickle in a new process.

    Raises:
        AttributeError: no family has it.
    """
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, key=_unlike(name)):
        source = CONFIG_MAPPING[model_type].__module__.replace("configuration_", "modeling_")
        if importlib.util.find_spec(source) is None:  # the type uses another type's classes
            continue
        found = getattr(importlib.import_module(source), name, None)
        if found is not None:
            row = ARCHITECTURES.get(model_type)
            return found, row or architecture_of({"model_type": model_type})
    raise AttributeError(f"no model family has a class '{name}'")


def _unlike(name: str) -> Callable[[str], int]:
    """Order model types so that the first ones' classes are called like ``name``.

    ``BambaDecoderLayer`` belongs to the type of ``BambaConfig``; all others are a last resort.
    """

    def rank(model_type: str) -> int:
        stem = CONFIG_MAPPING_NAMES[model_type].removesuffix("Config")
        return -len(stem) if name.startswith(stem) else 0

    return rank


def __getattr__(name: str) -> Any:
    if name.startswith(_PREFIX):
        return attached_layer_class(host_layer_class(name.removeprefix(_PREFIX))[0])
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
