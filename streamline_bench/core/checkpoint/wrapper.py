"""Multimodal folders, presented as the causal LM inside them.

A folder of, say, ``Gemma3ForConditionalGeneration`` holds a vision tower, a projector and a text
model. All work here is on the text model: :class:`.CheckpointReader` gives its config and its
tensors under the names of the text model's own causal LM. Only the writer knows about the rest: it
gives names and config their outer form back and copies everything else byte for byte.

The text config comes from transformers' own config class of the folder (flat ones of Qwen2-VL
included). The text model's tensors are found by the prefixes in :data:`_PLACES`.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from streamline_bench.core.architecture import architecture_of, config_entry, config_of
from streamline_bench.core.text_models import ensure_causal_lm
from streamline_bench.errors import ArchitectureError, CheckpointError, library_errors

log = logging.getLogger(__name__)

_INNER = ("text_config", "vision_config", "audio_config")
"""Entries of ``config.json`` one of which every wrapper has."""

_PLACES = (
    "model.language_model.", "language_model.{base}.", "model.text_model.", "text_model.{base}.",
    "{base}.",
)  # fmt: skip
"""Where the text model's base is in a wrapper, as checkpoints spell it; the first that fits."""
_HEADS = ("language_model.", "text_model.", "")

_INHERITED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "quantization_config")
"""Entries that a text config takes from the wrapper's where it has none."""
_TIED = "tie_word_embeddings"
_NOTES = ("transformers_version", "_name_or_path", "architectures", "auto_map")

_NEUTRAL: Mapping[str, Any] = {
    "logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None
}  # fmt: skip
"""What a text model's own head does to logits -> the value that does nothing. Some wrappers have a
plain head over the same text model."""

_REFUSED = {
    "deepstack_layer_map": "it adds image features to text layers by their index",
    "spatial_target_layers": "it adds image features to text layers by their index",
    "cross_attention_layers": "its cross-attention layers read images and are skipped for text",
}
"""Entry of the wrapper's or the text config -> why its text layers cannot be looked at alone."""
_TARGET = "shared_kv_states"
"""What the forward pass of a model that only drafts for another one is given of that one."""


@dataclass(frozen=True)
class Wrapper:
    """How a folder's text model is named outside and inside.

    Attributes:
        config: the folder's ``config.json``.
        text_json: the text model's config as its own ``config.json`` would hold it.
        stored: name of a tensor of the text model -> its name in the folder.
        prefixes: prefix of the text model's names -> prefix in the folder.
        outer: names of all other tensors: tower, projector, layers for multi-token prediction.
    """

    config: Mapping[str, Any]
    text_json: Mapping[str, Any]
    stored: Mapping[str, str]
    prefixes: Mapping[str, str]
    outer: tuple[str, ...]

    @property
    def model_type(self) -> str:
        """Model type of the folder."""
        return str(self.config["model_type"])

    @property
    def text_type(self) -> str:
        """Model type of the text model."""
        return str(self.text_json["model_type"])

    def text_config(self) -> Any:
        """Return a new transformers config of the text model.

        One of type ``streamline`` has to be registered with transformers.
        """
        text = _text_of(_parsed(self.config), self.config)
        settings = getattr(text, "quantization_config", None)
        if settings:
            text.quantization_config = self.text_settings(settings)
        return text

    @cached_property
    def takes_any_text(self) -> bool:
        """Whether the wrapper builds its text model from a config of any model type."""
        from transformers import CONFIG_MAPPING, AutoConfig

        kind = CONFIG_MAPPING[self.model_type].sub_configs.get("text_config")
        return kind is AutoConfig and "text_config" in self.config

    def require_text_type(self, model_type: str) -> None:
        """Refuse to put a text model of another type into a wrapper that builds one type only.

        Raises:
            ArchitectureError: it is another type.
        """
        if model_type != self.text_type and not self.takes_any_text:
            raise ArchitectureError(
                f"A model of type '{self.model_type}' builds its text model as "
                f"'{self.text_type}' only, so that it cannot hold one of type "
                f"'{model_type}'; use a recipe whose result is a stock model, such as streamline "
                "or shortgpt."
            )

    def refuse_other_stream(self) -> NoReturn:
        """Refuse a text model with another residual stream than the one that images enter.

        Raises:
            ArchitectureError: always.
        """
        raise ArchitectureError(
            f"A model of type '{self.model_type}' puts features of images between the embeddings, "
            "where they would no longer fit a rotated and sliced residual stream; use a recipe "
            "that keeps the residual stream."
        )

    def stored_name(self, name: str) -> str:
        """Return what a tensor of the text model, also a new one, is called in the folder."""
        for inside, outside in self.prefixes.items():
            if name.startswith(inside):
                return outside + name.removeprefix(inside)
        return name

    def key_mapping(self) -> dict[str, str]:
        """Return stored prefix, as a regular expression -> prefix of the text model's own names."""
        return {f"^{re.escape(out)}": inside for inside, out in self.prefixes.items()}

    def written(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the folder's config with a changed text model.

        Entries that did not change keep the spelling that they have in the folder.

        Args:
            config: of the text model, as its own ``config.json`` would hold it.

        Raises:
            ArchitectureError: the wrapper cannot hold a text model of this type.
        """
        model_type = str(config["model_type"])
        self.require_text_type(model_type)
        if config.get("rotations"):
            self.refuse_other_stream()
        outer = copy.deepcopy(dict(self.config))
        inner = outer.get("text_config", outer)
        if model_type != self.text_json["model_type"]:
            inner.clear()
            inner.update({k: v for k, v in config.items() if k not in _NOTES[:2]})
            outer[_TIED] = bool(config_entry(config, _TIED))
            return outer
        for key in sorted({*config, *self.text_json} - {*_NOTES}):
            if key in config and config[key] == self.text_json.get(key):
                continue
            if key not in config and key not in self.text_json:
                continue
            inherited = key == _TIED or (key in _INHERITED and key in outer)
            for part in (inner, outer) if inherited else (inner,):
                self._set(part, key, config)
        return outer

    def _set(self, part: dict[str, Any], key: str, config: Mapping[str, Any]) -> None:
        part.pop("torch_dtype" if key == "dtype" else key, None)
        if key == "quantization_config" and key in config:
            part[key] = self.outer_settings(config[key], self._quantisation)
        elif key == _TIED:
            part[key] = bool(config_entry(config, key))  # the wrapper's own default may differ
        elif key in config:
            part[key] = config[key]

    @property
    def _quantisation(self) -> Any:
        inner = self.config.get("text_config") or {}
        return self.config.get("quantization_config") or inner.get("quantization_config")

    def text_settings(self, settings: Any) -> Any:
        """Return quantisation settings with the text model's own names of modules, and no others.

        Args:
            settings: ``quantization_config`` of the folder, or any part of it.
        """
        if isinstance(settings, Mapping):
            pairs = ((self._text_name(str(k)), v) for k, v in settings.items())
            return {k: self.text_settings(v) for k, v in pairs if k is not None}
        if isinstance(settings, list | tuple):
            items = [
                self._text_name(item) if isinstance(item, str) else self.text_settings(item)
                for item in settings
            ]
            return [item for item in items if item is not None]
        return settings

    def outer_settings(self, settings: Any, before: Any) -> Any:
        """Return quantisation settings of the text model as the folder spells them.

        Args:
            settings: what :meth:`text_settings` gave, changed.
            before: what it was given; its names outside the text model are taken over.
        """
        if isinstance(settings, Mapping):
            known = before if isinstance(before, Mapping) else {}
            spelled = {self._text_name(str(key)): value for key, value in known.items()}
            made = {
                self._module_name(key): self.outer_settings(value, spelled.get(key))
                for key, value in settings.items()
            }
            return made | {k: v for k, v in known.items() if self._text_name(str(k)) is None}
        if isinstance(settings, list | tuple):
            items = [
                self._module_name(i) if isinstance(i, str) else self.outer_settings(i, None)
                for i in settings
            ]
            listed = before if isinstance(before, list | tuple) else ()
            outside = [i for i in listed if isinstance(i, str) and self._text_name(i) is None]
            return [*items, *outside]
        return settings

    def _module_name(self, name: str) -> str:
        return self.stored_name(f"{name}.").removesuffix(".")

    def _text_name(self, name: str) -> str | None:
        """Name of a module of the text model; None for one outside it."""
        for inside, outside in self.prefixes.items():
            if f"{name}.".startswith(outside):
                return (inside + f"{name}.".removeprefix(outside)).removesuffix(".")
        return None if name.startswith(self.outer_modules) else name

    @cached_property
    def outer_modules(self) -> tuple[str, ...]:
        """Paths of the modules outside the text model, as the folder spells them."""
        parts = (name.split(".") for name in self.outer)
        return tuple({".".join(p[:2] if p[0] == "model" else p[:1]) for p in parts})

    def warn_of_taps(self, names: Mapping[str, str], layers: str) -> None:
        """Warn where layers are removed behind which image features are added.

        Args:
            names: new tensor name -> old one, of the text model.
            layers: path of its layers.
        """
        tower = self.config.get("vision_config")
        taps = tower.get("deepstack_visual_indexes") if isinstance(tower, Mapping) else None
        kept = re.compile(rf"{re.escape(layers)}\.(\d+)\.")
        moved = {int(n[1]): int(o[1]) for n, o in _pairs(kept, names)}
        shifted = [tap for tap in range(len(taps or ())) if moved and moved.get(tap) != tap]
        if shifted:
            log.warning(
                "Image features are added behind the first %d text layers (deepstack); some of "
                "these were removed, so that features are now added behind other layers from "
                "layer %d on. Text alone is not affected.", len(taps or ()), shifted[0],
            )  # fmt: skip


def _pairs(pattern: re.Pattern[str], names: Mapping[str, str]) -> Iterable[tuple[Any, Any]]:
    for new, old in names.items():
        both = pattern.match(new), pattern.match(old)
        if all(both):
            yield both


def may_be_wrapper(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` has the parts of a multimodal model."""
    return any(isinstance(config.get(key), Mapping) for key in _INNER)


def wrapper_of(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> Wrapper | None:
    """Return how the text model of a folder is wrapped; None if the folder is a text model's own.

    Args:
        config: the parsed ``config.json``.
        names: of all stored tensors.

    Raises:
        CheckpointError: the config cannot be read, or the text model's tensors are not found.
        ArchitectureError: the text model cannot be looked at alone.
    """
    if not may_be_wrapper(config):
        return None
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and inner.get("host_model_type"):
        found = dict(inner)  # of a type that is not transformers' own
    else:
        text = text_config_of(folder, config)
        if text is None:
            return None
        found = json.loads(text.to_json_string(use_diff=True))
    prefixes = _prefixes(folder, found, names)
    stored: dict[str, str] = {}
    outer: list[str] = []
    for name in names:
        inside = next((i for i, out in prefixes.items() if name.startswith(out)), None)
        if inside is None:
            outer.append(name)
        else:
            stored[inside + name.removeprefix(prefixes[inside])] = name
    wrapper = Wrapper(config, found, stored, prefixes, tuple(outer))
    if found.get("quantization_config"):
        found["quantization_config"] = wrapper.text_settings(found["quantization_config"])
    return wrapper


def text_config_of(folder: Path, config: Mapping[str, Any]) -> Any:
    """Return the transformers config of a folder's text model; None if it is no multimodal one.

    Args:
        config: the parsed ``config.json``.

    Raises:
        CheckpointError: the config cannot be read.
        ArchitectureError: the text model cannot be looked at alone.
    """
    if not may_be_wrapper(config):
        return None
    with library_errors(
        f"{folder}: the config cannot be loaded", "correct config.json", CheckpointError
    ):
        whole = _parsed(config)
        text = None if whole is None else whole.get_text_config(decoder=True)
        if text is None or text is whole or whole.is_encoder_decoder:
            return None
        _refuse(config, whole, text)
        ensure_causal_lm(text, str(config["model_type"]))
        return _text_of(whole, config)


def _parsed(config: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:
        return None
    return config_of(CONFIG_MAPPING[config["model_type"]], config)


def _text_of(whole: Any, config: Mapping[str, Any]) -> Any:
    """Return the text config, which then says what the wrapper says in its place."""
    text = whole.get_text_config(decoder=True)
    for key in _INHERITED:
        if getattr(text, key, None) is None and getattr(whole, key, None) is not None:
            setattr(text, key, getattr(whole, key))
    text.tie_word_embeddings = bool(getattr(whole, _TIED, False))
    changed = [key for key, value in _NEUTRAL.items() if getattr(text, key, value) != value]
    used = _names_in_forward(config) if changed else set()
    for key in changed:
        if "lm_head" in used and key not in used:  # else the head is the text model's own
            setattr(text, key, _NEUTRAL[key])
    return text


def _names_in_forward(config: Mapping[str, Any]) -> set[str]:
    """Names that the forward pass of the folder's class mentions."""
    import transformers

    kind = getattr(transformers, next(iter(config.get("architectures") or ()), ""), None)
    if kind is None:
        return set()
    code = inspect.unwrap(kind.forward).__code__
    return {*code.co_names, *(text for text in code.co_consts if isinstance(text, str))}


def _refuse(config: Mapping[str, Any], whole: Any, text: Any) -> None:
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM._model_mapping.get(type(whole), None)
    if kind is not None and _TARGET in inspect.signature(kind.forward).parameters:
        raise ArchitectureError(
            f"Model type '{config['model_type']}' is not supported: it drafts tokens for another "
            f"model, whose keys and values it reads ({_TARGET}); give the model that it drafts for."
        )
    for key, reason in _REFUSED.items():
        if config.get(key) or getattr(text, key, None):
            raise ArchitectureError(
                f"A model of type '{config['model_type']}' with {key} is not supported: {reason}; "
                "use another model."
            )


def _prefixes(folder: Path, text: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    known = list(names)
    for own in (_own_paths(text, guess) for guess in (True, False)):
        base, layers = own[0].split(".", 1)
        for place in _PLACES:
            outside = place.format(base=base)
            if any(name.startswith(f"{outside}{layers}.0.") for name in known):
                head = _head(known, outside)
                if outside != f"{base}.":
                    return {f"{base}.": outside, "lm_head.": head}
                # Towers may stand next to the layers.
                return {**{f"{path}.": f"{path}." for path in own}, "lm_head.": head}
    raise CheckpointError(
        f"{folder} has no layers of a text model at any place where they are looked for "
        f"({', '.join(place.format(base='model') for place in _PLACES)}); save it again with "
        "save_pretrained."
    )


def _own_paths(text: Mapping[str, Any], guess: bool) -> tuple[str, ...]:
    """Return the paths of layers, embeddings and final norm; a guess costs nothing."""
    if guess:
        return ("model.layers", "model.embed_tokens", "model.norm")
    row = architecture_of(text)
    return (row.layers, *row.embeddings, row.final_norm)


def _head(names: Sequence[str], outside: str) -> str:
    for place in _HEADS:
        if any(name.startswith(f"{place}lm_head.") for name in names):
            return f"{place}lm_head."
    inside = next((place for place in _HEADS if place and outside.startswith(place)), "")
    return f"{inside}lm_head."
