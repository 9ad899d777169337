"""Recognises quantised checkpoints: whose tensors are codes that mean nothing without scales.

One place decides, from ``config.json``, ``hf_quant_config.json`` and the tensors themselves. Work
that only copies bytes renumbers the lists of layers (:func:`renumbered`). Work that reads or runs
the weights gets them decoded (:mod:`.codes`); formats that are not known are refused
(:meth:`.CheckpointReader.refuse_quantised`). A result that keeps some codes names the modules
without them in its config (:func:`with_exceptions`).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from streamline_bench.core.checkpoint.folder import TensorEntry
from streamline_bench.errors import ArchitectureError, CheckpointError

MODELOPT_NAME = "hf_quant_config.json"

_EXCEPTIONS = {
    "fp8": "modules_to_not_convert", "fbgemm_fp8": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert", "awq": "modules_to_not_convert",
    "compressed-tensors": "ignore", "bitsandbytes": "llm_int8_skip_modules",
}  # fmt: skip
"""Method -> its list of modules that are not quantised. The others have none that all readers know.
"""
_KEYS = ("quantization_config", "compression_config", "quantization")  # the last: MLX

_CODES = (".qweight", ".weight_packed", "_blocks", ".weight_q", ".codes")
_SCALES = re.compile(
    r"(\.|_)(weight_)?(scales?|scale_inv|scale_2|scb|absmax|qzeros|zero_points?|zeros|biases|g_idx|shape"
    r"|quant_map|nested_absmax|nested_quant_map|quant_state(\.\w+)*|input_scale|k_scale|v_scale"
    r"|weight_scale|weight_shape|weight_zero_point|weight_g_idx)$",
    re.IGNORECASE,
)
_BITS = {"I32": 32, "U32": 32, "U8": 8, "I8": 8}
_LAYER = re.compile(r"(?<![A-Za-z0-9_])(?:layers|h|blocks)\.(?P<layer>\d+)(?P<after>\.|$)")
_SEVERAL = re.compile(r"(?<![A-Za-z0-9_])(?:layers|h|blocks)\.(\d+[*?\[]|\d*\[)")
"""Of names with ``*``, ``?`` and ``[...]``, as modelopt has them: ``layers.1*``."""

_PATTERN = re.compile(
    r"(?<![A-Za-z0-9_])(?:layers|h|blocks)\\?\."
    r"(?P<layer>(?:(?:\d|\\d|\[[^\]]*\]|\((?:\?:|(?!\?))[^()]*\)|\.(?=[*+]))"
    r"(?:[*+?]|\{\d+(?:,\d*)?\})?)+?)"
    r"(?P<after>\\\.|\.(?P<any>[*+])?|\$|$)"
)
"""Of regular expressions: the part that stands for the layer's number, and what follows it."""


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are stored.

    Attributes:
        method: as ``quant_method`` names it (``fp8``, ``gptq``, ``modelopt``, …); ``float8`` or
            ``integer`` or ``mlx`` where only the tensors tell.
        bits: per weight.
        stored: the tensors hold codes; False for a config that announces them over plain weights.
        settings: what the config says.
    """

    method: str
    bits: int
    stored: bool
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exceptions(self) -> str | None:
        """Name of the list of modules that are not quantised; None where there is no such list."""
        return _EXCEPTIONS.get(self.method)

    @property
    def ignored(self) -> bool:
        """Whether a config announces codes over plain weights, and transformers loads it all the
        same.

        It does for ``mxfp4`` (left in the configs of fine-tuned gpt-oss models) and for methods
        that it does not know, such as modelopt's.
        """
        return not self.stored and (self.method == "mxfp4" or not is_known(self.method))

    def numel(self, entry: TensorEntry) -> int:
        """Return how many parameters a tensor holds, of a format that is not decoded."""
        if not self.stored:
            return entry.numel
        if is_scale(entry.name):
            return 0
        packed = len(entry.shape) > 1 or entry.name.endswith(_CODES)
        return (
            entry.numel * _BITS.get(entry.dtype, self.bits) // self.bits if packed else entry.numel
        )


def quantisation_of(
    folder: Path, config: Mapping[str, Any], codes: Sequence[TensorEntry]
) -> Quantisation | None:
    """Return how a checkpoint is quantised; None if neither its files nor its tensors say so.

    Args:
        codes: the stored tensors of which :func:`is_code` says so.
    """
    settings = _settings(folder, config)
    if settings is None and not codes:
        return None
    settings = settings or {}
    method = str(settings.get("quant_method") or settings.get("quant_algo") or "").lower()
    if settings.get("quant_algo"):
        method = "modelopt"
    if not method and any(entry.dtype == "U32" for entry in codes):
        method = "mlx"
    if not method:
        method = "float8" if codes and codes[0].dtype.startswith("F8") else "integer"
    return Quantisation(method, _bits(settings, codes), bool(codes), settings)


def is_scale(name: str) -> bool:
    """Whether a tensor goes with codes and is no weight itself."""
    return _SCALES.search(name) is not None


def plain_config(config: Any) -> Any:
    """Return a transformers config without settings of quantisation."""
    plain = copy.deepcopy(config)
    if getattr(plain, "quantization_config", None) is not None:
        del plain.quantization_config
    return plain


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a ``config.json`` as that of a model with plain weights."""
    return {
        key: without_settings(value) if key == "text_config" else value
        for key, value in config.items()
        if key not in _KEYS
    }


def with_exceptions(config: Mapping[str, Any], key: str, modules: Iterable[str]) -> dict[str, Any]:
    """Return the content of a ``config.json`` that names modules which are not quantised.

    Args:
        key: name of the list, see :attr:`Quantisation.exceptions`.
        modules: whole names.
    """
    changed = dict(config)
    for where in _KEYS:
        if isinstance(changed.get(where), Mapping):
            listed = list(changed[where].get(key) or ())
            listed += [name for name in modules if name not in listed]
            changed[where] = {**changed[where], key: listed}
    if isinstance(changed.get("text_config"), Mapping):
        changed["text_config"] = with_exceptions(changed["text_config"], key, modules)
    return changed


def renumbered(settings: Any, keep: Sequence[int]) -> Any:
    """Return quantisation settings for a model with only the layers in ``keep``.

    Names of modules, in lists and as keys, follow their layers. Those of removed layers are left
    out.

    Args:
        settings: ``quantization_config`` or any part of it.

    Raises:
        ArchitectureError: a pattern names several layers at once, which cannot be renumbered.
    """
    if isinstance(settings, Mapping):
        pairs = ((_renamed(str(key), keep), value) for key, value in settings.items())
        return {key: renumbered(value, keep) for key, value in pairs if key is not None}
    if isinstance(settings, (list, tuple)):
        items = [_renamed(i, keep) if isinstance(i, str) else renumbered(i, keep) for i in settings]
        return [item for item in items if item is not None]
    return settings


def _renamed(name: str, keep: Sequence[int]) -> str | None:
    if name.startswith(("re:", "+:", "-:")) or "\\" in name:
        return _renamed_pattern(name, keep)
    if _SEVERAL.search(name):
        raise _several_layers(name)
    found = _LAYER.search(name)
    if found is None:
        return name
    layer = int(found["layer"])
    if layer not in keep:
        return None
    return f"{name[: found.start('layer')]}{list(keep).index(layer)}{name[found.end('layer') :]}"


def _renamed_pattern(name: str, keep: Sequence[int]) -> str | None:
    """A regular expression names the layers that it matches: as far as it goes, from the start."""
    place = re.search(r"(?<![A-Za-z0-9_])(?:layers|h|blocks)\\?\.(?![*+?])", name)
    if place is None:
        return name
    found = _PATTERN.match(name, place.start())
    if found is None:
        raise _several_layers(name)
    # Without a literal dot or an end behind it, layers.1 is the beginning of layers.10 as well.
    open_end = not found["after"] or bool(found["any"])
    try:
        number = re.compile(found["layer"])
    except re.error:
        raise _several_layers(name) from None
    matches = number.match if open_end else number.fullmatch
    if all(matches(str(layer)) for layer in range(max(keep, default=0) + 1)):
        return name
    kept = [str(new) for new, old in enumerate(keep) if matches(str(old))]
    if not kept:
        return None
    numbers = kept[0] if len(kept) == 1 else f"(?:{'|'.join(kept)})"
    end = rf"\.{name[found.start('any') - 1 :]}" if found["any"] else name[found.start("after") :]
    if not found["after"]:
        end = r"(?:\.|$)"
    return f"{name[: found.start('layer')]}{numbers}{end}"


def _several_layers(name: str) -> ArchitectureError:
    return ArchitectureError(
        f"The quantisation settings name several layers by the pattern '{name}', which cannot "
        "be renumbered when layers are removed; list the layers in config.json."
    )


def _settings(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the files say: the config's entry, an older spelling of it, or modelopt's own file."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in _KEYS:
            if isinstance(part.get(key), Mapping) and part[key]:
                return dict(part[key])
    path = folder / MODELOPT_NAME
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["quantization"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is not readable; download it again.") from None
    # transformers does not look at this file; so that plain weights stay plain.
    return found if isinstance(found, Mapping) and found.get("quant_algo") else None


def is_code(entry: TensorEntry) -> bool:
    """Whether a tensor holds codes."""
    if entry.name.endswith(_CODES):
        return True
    whole = entry.dtype in ("I8", "U8", "U32") or entry.dtype.startswith("F8")
    return whole and len(entry.shape) > 1 and not is_scale(entry.name)


def _bits(settings: Mapping[str, Any], codes: Sequence[TensorEntry]) -> int:
    for key in ("bits", "w_bit", "num_bits"):
        if isinstance(settings.get(key), int):
            return int(settings[key])
    if settings.get("load_in_8bit"):
        return 8
    for group in (settings.get("config_groups") or {}).values():
        bits = (group.get("weights") or {}).get("num_bits") if isinstance(group, Mapping) else None
        if isinstance(bits, int):
            return bits
    return 8 if not codes or codes[0].dtype.startswith("F8") or codes[0].dtype == "I8" else 4


@cache
def is_known(method: str) -> bool:
    """Whether transformers knows a quantisation method."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    return method in {
        name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING
    }
