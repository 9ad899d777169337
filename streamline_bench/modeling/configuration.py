"""Configuration of the ``streamline`` model type: a host family's config plus ``attachments``,
``layer_widths``, ``rotations`` or ``removed_sublayers``.

Every instance is of a class made on the fly from the host's config class, so that the host's
modeling code, plans and generation find all they expect; in JSON all host entries stay at the top
level. Classes are made once per host and found again by name, which lets instances be pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from streamline_bench.core.architecture import architecture_of
from streamline_bench.errors import ArchitectureError, CheckpointError

if TYPE_CHECKING:  # each is imported by the configs that have such entries
    from streamline_bench.modeling.attachments import Attachment
    from streamline_bench.modeling.rotations import Rotations
    from streamline_bench.modeling.sublayers import RemovedSublayers
    from streamline_bench.modeling.widths import LayerWidths

MODEL_TYPE = "streamline"
_PREFIX = "Streamline"
_classes: dict[str, type[StreamlineConfig]] = {}
_listeners: list[Callable[[type[StreamlineConfig]], None]] = []


@strict
class StreamlineConfig(PreTrainedConfig):  # type: ignore[misc]
    """Config of a host model with networks behind some layers, widths of each layer's own, or
    layers without attention or MLP.

    Where ``layer_widths`` is given, the host's own entries for heads and channels are those of its
    widest layers: the head size and the host's validation go by them. Where ``rotations`` is given,
    ``hidden_size`` stays the width before slicing.

    ``StreamlineConfig(host_model_type="llama", attachments=[...], hidden_size=...)`` gives an
    instance of a subclass of both this class and ``LlamaConfig``.

    Raises:
        CheckpointError: ``host_model_type`` is missing, or an attachment or width is not valid.
        ArchitectureError: transformers has no causal language model of the host's type.
    """

    model_type: ClassVar[str] = MODEL_TYPE

    host_model_type: str = ""
    attachments: list[Any] | None = None
    layer_widths: list[Any] | None = None
    rotations: dict[str, Any] | None = None
    removed_sublayers: dict[str, Any] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> StreamlineConfig:
        # Without a host only the bare class remains, which transformers makes to learn defaults.
        if cls is StreamlineConfig and kwargs.get("host_model_type"):
            cls = config_class_for(kwargs["host_model_type"])
        return super().__new__(cls)  # type: ignore[no-any-return]

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.host_model_type:
            self.attachments = [a.to_dict() for a in self.parsed_attachments()]
            rotations = self.parsed_rotations()
            self.rotations = None if rotations is None else rotations.to_dict()
            if self.layer_widths is not None:
                self.layer_widths = [w.to_dict() for w in self.parsed_layer_widths()]
            removed = self.parsed_removed_sublayers()
            self.removed_sublayers = None if removed is None else removed.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return an instance for ``config_dict["host_model_type"]`` (see PreTrainedConfig)."""
        if cls is not StreamlineConfig:
            return super().from_dict(config_dict, **kwargs)
        host = config_dict.get("host_model_type")
        if not host:
            raise CheckpointError(
                "A config of model type 'streamline' has no 'host_model_type', so the family it "
                "extends is unknown; write the checkpoint again with streamline-bench compress."
            )
        return config_class_for(host).from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return all entries; ``architectures`` names the public classes, not the made ones.

        ``removed_sublayers`` stands there only where there are some.
        """
        output: dict[str, Any] = super().to_dict()
        if output.get("removed_sublayers") is None:
            output.pop("removed_sublayers", None)
        if output.get("architectures"):
            output["architectures"] = [_public_name(name) for name in output["architectures"]]
        return output

    def parsed_attachments(self) -> tuple[Attachment, ...]:
        """Return the attachments in order of their places."""
        if not self.attachments:
            return ()
        from streamline_bench.modeling.attachments import parse_attachments

        return parse_attachments(self.attachments, self)

    def parsed_layer_widths(self) -> tuple[LayerWidths, ...]:
        """Return the widths of each layer; nothing if all have those of the host's entries."""
        if self.layer_widths is None:
            return ()
        from streamline_bench.modeling.widths import parse_layer_widths, require_narrowable

        require_narrowable(architecture_of(self))
        return parse_layer_widths(self.layer_widths, self)

    def parsed_rotations(self) -> Rotations | None:
        """Return the widths of a rotated residual stream, None if it is the host's own."""
        if self.rotations is None:
            return None
        if self.attachments or self.layer_widths:
            raise CheckpointError(
                "A config has rotations together with attachments or layer_widths, which is not "
                "supported; write the checkpoint again."
            )
        from streamline_bench.modeling.rotations import Rotations

        return Rotations.parse(self.rotations, self)

    def parsed_removed_sublayers(self) -> RemovedSublayers | None:
        """Return the layers without attention or MLP, None if each has both."""
        if self.removed_sublayers is None:
            return None
        if self.attachments or self.layer_widths or self.rotations:
            raise CheckpointError(
                "A config has removed_sublayers together with attachments, layer_widths or "
                "rotations, which is not supported; write the checkpoint again."
            )
        from streamline_bench.modeling.sublayers import RemovedSublayers

        return RemovedSublayers.parse(self.removed_sublayers, self)


def streamline_config(
    host_config: Any,
    attachments: Iterable[Any] = (),
    *,
    layer_widths: Iterable[LayerWidths] | None = None,
    rotations: Rotations | None = None,
    removed_sublayers: RemovedSublayers | None = None,
) -> StreamlineConfig:
    """Return the config to save for a (pruned) host model with ``attachments``.

    Args:
        host_config: the pruned model's own config.
        attachments: :class:`Attachment` objects or mappings of the same form.
        layer_widths: heads and channels of each layer, where they are not the host's.
        rotations: widths of a residual stream that was rotated and sliced.
        removed_sublayers: the layers without attention or MLP.

    Raises:
        ArchitectureError: the family is not supported, its widths are fixed, or the model has
            attachments or widths of its own already.
    """
    if isinstance(host_config, StreamlineConfig):
        raise ArchitectureError(
            "This model is of type 'streamline', the result of a compression; give the dense model."
        )
    entries = host_config.to_dict()
    entries.pop("model_type", None)
    entries["host_model_type"] = host_config.model_type
    entries["architectures"] = ["StreamlineForCausalLM"]
    entries["attachments"] = [
        dict(a) if isinstance(a, Mapping) else a.to_dict() for a in attachments
    ]
    if layer_widths is not None:
        entries["layer_widths"] = [widths.to_dict() for widths in layer_widths]
    if rotations is not None:
        entries["rotations"] = rotations.to_dict()
    if removed_sublayers is not None:
        entries["removed_sublayers"] = removed_sublayers.to_dict()
    config: StreamlineConfig = StreamlineConfig.from_dict(entries)
    return config


def config_class_for(host_model_type: str) -> type[StreamlineConfig]:
    """Return (making it on first use) the config class of a host family.

    Raises:
        ArchitectureError: transformers has no causal language model of this type.
    """
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(host_model_type) is None:
        raise ArchitectureError(
            f"Host model type '{host_model_type}' is not supported: transformers has no causal "
            "language model of this type; upgrade transformers."
        )
    if host_model_type not in _classes:
        made = _make_class(CONFIG_MAPPING[host_model_type])
        _classes[host_model_type] = made
        for listener in _listeners:
            listener(made)
    return _classes[host_model_type]


def on_new_host(listener: Callable[[type[StreamlineConfig]], None]) -> None:
    """Call ``listener`` with every config class made so far and from now on."""
    _listeners.append(listener)
    for made in _classes.values():
        listener(made)


def _make_class(host_class: type[Any]) -> type[StreamlineConfig]:
    name = _PREFIX + host_class.__name__
    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{host_class.__name__} with networks attached to its layers.",
        "__annotations__": {},
        "model_type": MODEL_TYPE,
    }
    # The host comes first: its defaults must win over those of the common base class.
    made: type[StreamlineConfig] = strict(type(name, (host_class, StreamlineConfig), namespace))
    return made


def _public_name(name: str) -> str:
    if not name.startswith(_PREFIX):
        return name
    is_causal = name.endswith(("ForCausalLM", "LMHeadModel"))
    return "StreamlineForCausalLM" if is_causal else "StreamlineModel"


def __getattr__(name: str) -> Any:
    """Find a made class by name, so that a pickle can be read in a new process."""
    host_name = name.removeprefix(_PREFIX)
    if host_name != name:
        for made in _classes.values():  # two types may share a host's class
            if made.__name__ == name:
                return made
        for model_type, class_name in CONFIG_MAPPING_NAMES.items():
            if class_name == host_name and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                return config_class_for(model_type)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
