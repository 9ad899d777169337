"""``StreamlineForCausalLM`` and ``StreamlineModel``: any host family with networks attached, or
with widths of each layer's own, on a sliced residual stream, or with layers that lack attention or
MLP.

Both are entrances: they look at the config and hand over to a class made on the fly from the
host's own class (``LlamaForCausalLM``, ...), whose only changes are that layers with an entry in
``config.attachments`` run their network, that ``config.layer_widths`` resizes them, that
``config.rotations`` gives them shortcut matrices and that ``config.removed_sublayers`` takes parts
out of them. Attention goes through the host's code, hence
through transformers' attention interface, which is what lets other engines host the model.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, TypeVar

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.replacement import ReplacementNetwork
from streamline_bench.modeling.attachments import BEFORE_FIRST, attach_network
from streamline_bench.modeling.configuration import StreamlineConfig, config_class_for
from streamline_bench.modeling.rotations import rotate_modules
from streamline_bench.modeling.sublayers import remove_sublayers
from streamline_bench.modeling.widths import resize_layer

_PREFIX = "Streamline"
_Entrance = TypeVar("_Entrance", bound="_StreamlineHost")
_classes: dict[tuple[str, str], type[_StreamlineHost]] = {}


class _StreamlineHost(PreTrainedModel):  # type: ignore[misc]
    """What both entrances share: dispatch to the host's class, and building of the networks."""

    config_class = StreamlineConfig
    _host_names: dict[str, str] = {}  # noqa: RUF012 - the entrances name transformers' own tables

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        layers = _layers_of(self)
        for layer, widths in zip(layers, config.parsed_layer_widths(), strict=False):
            resize_layer(layer, architecture_of(config), config, widths)
        for attachment in config.parsed_attachments():
            before = attachment.after_layer == BEFORE_FIRST
            layer = layers[0 if before else attachment.after_layer]
            attach_network(layer, attachment.build(config), before=before)
            self._no_split_modules.add(type(layer).__name__)
        rotations = config.parsed_rotations()
        if rotations is not None:
            rotate_modules(self, rotations)
            self._no_split_modules.add(type(layers[0]).__name__)
        removed = config.parsed_removed_sublayers()
        if removed is not None:
            remove_sublayers(layers, config, removed)
        # The host's own constructor has initialised all else; this reaches the new modules only.
        self.init_weights()

    @init.guard_torch_init_functions()  # type: ignore[untyped-decorator]
    def initialize_weights(self) -> None:
        """Initialise what was not loaded; networks by their own rule, not by the host's."""
        fresh = [m for m in self.modules() if isinstance(m, ReplacementNetwork) and not _done(m)]
        super().initialize_weights()
        for network in fresh:
            network.reset_parameters()

    @classmethod
    def from_pretrained(cls, pretrained: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a checkpoint of model type ``streamline`` (see PreTrainedModel.from_pretrained)."""
        if cls not in (StreamlineForCausalLM, StreamlineModel):
            return super().from_pretrained(pretrained, *args, config=config, **kwargs)
        if not isinstance(config, StreamlineConfig):
            config = StreamlineConfig.from_pretrained(config or pretrained)
        return model_class_for(cls, config.host_model_type).from_pretrained(
            pretrained, *args, config=config, **kwargs
        )

    @classmethod
    def from_config(cls, config: StreamlineConfig, **kwargs: Any) -> Any:
        """Build a model with fresh weights."""
        return cls._from_config(config, **kwargs)

    @classmethod
    def _from_config(cls, config: StreamlineConfig, **kwargs: Any) -> Any:
        if cls not in (StreamlineForCausalLM, StreamlineModel):
            return super()._from_config(config, **kwargs)
        return model_class_for(cls, config.host_model_type)._from_config(config, **kwargs)


class StreamlineForCausalLM(_StreamlineHost):
    """A causal LM of any host family with networks behind some of its layers.

    ``StreamlineForCausalLM.from_pretrained(folder)`` gives an instance of a subclass of both this
    class and the host's causal LM class.
    """

    _host_names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


class StreamlineModel(_StreamlineHost):
    """The decoder stack without an LM head (see :class:`StreamlineForCausalLM`)."""

    _host_names = MODEL_MAPPING_NAMES


def model_class_for(entrance: type[_Entrance], host_model_type: str) -> type[_Entrance]:
    """Return (making it on first use) the class of a host family for one of the two entrances."""
    key = (entrance.__name__, host_model_type)
    if key not in _classes:
        config_class = config_class_for(host_model_type)
        host_class = _host_model_class(entrance._host_names[host_model_type], host_model_type)
        name = _made_name(host_class.__name__, host_model_type)
        namespace = {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{host_class.__name__} with networks attached to its layers.",
            "config_class": config_class,
        }
        _classes[key] = type(name, (entrance, host_class), namespace)
        share_conversions(name, host_class.__name__, host_model_type)
    return _classes[key]


def _made_name(host_name: str, host_model_type: str) -> str:
    """Name the class after the host's; some types use another type's class under their own name."""
    stem = CONFIG_MAPPING_NAMES[host_model_type].removesuffix("Config")
    return _PREFIX + ("" if host_name.startswith(stem) else stem) + host_name


def share_conversions(name: str, host_name: str, host_model_type: str) -> None:
    """Let checkpoints with the host's older tensor names (fused experts, ...) load as the host's.

    transformers looks these rules up by class name or model type, and finds neither for ours.
    """
    rules = get_checkpoint_conversion_mapping(host_name)
    rules = rules or get_checkpoint_conversion_mapping(host_model_type)
    if rules is not None:
        register_checkpoint_conversion_mapping(name, rules, overwrite=True)


def _host_model_class(name: str, model_type: str) -> type[Any]:
    source = CONFIG_MAPPING[model_type].__module__.replace("configuration_", "modeling_")
    if importlib.util.find_spec(source) is None:  # the type uses another type's classes
        source = "transformers"
    found: type[Any] = getattr(importlib.import_module(source), name)
    return found


def _layers_of(model: Any) -> nn.ModuleList:
    architecture = architecture_of(model.config)
    path = architecture.layers
    if not isinstance(model, StreamlineForCausalLM):
        path = path.removeprefix(architecture.base + ".")
    layers: nn.ModuleList = model.get_submodule(path)
    return layers


def _done(network: nn.Module) -> bool:
    return all(getattr(p, "_is_hf_initialized", False) for p in network.parameters())


def __getattr__(name: str) -> Any:
    """Find a made class by name, so that a pickle can be read in a new process."""
    if name.startswith(_PREFIX):
        for made in _classes.values():  # two types may share a host's class
            if made.__name__ == name:
                return made
        for entrance in (StreamlineForCausalLM, StreamlineModel):
            for model_type, host_name in entrance._host_names.items():
                if isinstance(host_name, str) and _made_name(host_name, model_type) == name:
                    return model_class_for(entrance, model_type)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
