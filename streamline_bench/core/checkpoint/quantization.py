"""Recognises quantised checkpoints: whose tensors are codes that mean nothing without scales.

One place decides, from ``config.json``, ``hf_quant_config.json`` and the tensors themselves. What
only copies bytes may go on with such a checkpoint, after its lists of layers were renumbered
(:func:`renumbered`); what reads or runs the weights refuses it by name (:func:`refuse_quantised`).
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_bench.errors import ArchitectureError, CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    from streamline_bench.core.checkpoint.reader import CheckpointReader, TensorEntry

MODELOPT_NAME = "hf_quant_config.json"

_PACKAGES = {
    "gptq": ("gptqmodel", "gptqmodel optimum"),
    "awq": ("gptqmodel", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "aqlm": ("aqlm", "'aqlm[gpu,cpu]'"),
    "auto-round": ("auto_round", "auto-round"),
    "eetq": ("eetq", "eetq"),
    "fbgemm_fp8": ("fbgemm_gpu", "fbgemm-gpu"),
    "hqq": ("hqq", "hqq"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "quark": ("quark", "amd-quark"),
    "spqr": ("spqr_quant", "'spqr_quant[gpu]'"),
    "torchao": ("torchao", "torchao"),
    "vptq": ("vptq", "vptq"),
}
"""Method -> module that transformers needs to load it, and what ``pip install`` takes."""

_CODES = (".qweight", ".weight_packed", "_blocks", ".weight_q", ".codes")
_SCALES = re.compile(
    r"(\.|_)(weight_)?(scales?|scale_inv|scale_2|scb|absmax|qzeros|zero_points?|zeros|g_idx|shape"
    r"|quant_map|nested_absmax|nested_quant_map|quant_state(\.\w+)*|input_scale|k_scale|v_scale"
    r"|weight_scale|weight_shape|weight_zero_point|weight_g_idx)$",
    re.IGNORECASE,
)
_BITS = {"I32": 32, "U8": 8, "I8": 8}
_LAYER = re.compile(
    r"(?P<before>(?:^|[.:\\])(?:layers|h|blocks)\\?\.)(?P<layer>\d+)(?P<after>\\?\.|$)"
)
_SEVERAL = re.compile(r"(?:layers|h|blocks)\\?\.[(\[\\]")


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are stored.

    Attributes:
        method: as ``quant_method`` names it (``fp8``, ``gptq``, ``modelopt``, …); ``float8`` or
            ``integer`` where only the tensors tell.
        bits: per weight.
        stored: the tensors hold codes; False for a config that announces them over plain weights.
    """

    method: str
    bits: int
    stored: bool

    def numel(self, entry: TensorEntry) -> int:
        """Return how many parameters of the model a stored tensor holds."""
        if not self.stored:
            return entry.numel
        if _SCALES.search(entry.name):
            return 0
        packed = len(entry.shape) > 1 or entry.name.endswith(_CODES)
        return (
            entry.numel * _BITS.get(entry.dtype, self.bits) // self.bits if packed else entry.numel
        )


def quantisation_of(reader: CheckpointReader) -> Quantisation | None:
    """Return how a checkpoint is quantised; None for one with plain weights and no word of it."""
    settings = _settings(reader)
    # Buffers are left out: old GPT-2 files keep their causal mask as bytes.
    codes = [e for e in map(reader.entry, reader.parameter_names) if _is_code(e)]
    if settings is None and not codes:
        return None
    settings = settings or {}
    method = str(settings.get("quant_method") or settings.get("quant_algo") or "").lower()
    if settings.get("quant_algo"):
        method = "modelopt"
    if not method:
        method = "float8" if codes and codes[0].dtype.startswith("F8") else "integer"
    return Quantisation(method, _bits(settings, codes), bool(codes))


def is_ignored(found: Quantisation) -> bool:
    """Whether a config announces codes over plain weights, and transformers loads these as such.

    It does for ``mxfp4`` (left in the configs of fine-tuned gpt-oss models) and for methods that it
    does not know, such as modelopt's.
    """
    return not found.stored and (found.method == "mxfp4" or not _is_known(found.method))


def refuse_quantised(reader: CheckpointReader, what: str) -> None:
    """Refuse a checkpoint whose weights must not be used without their scales.

    Args:
        what: what would go wrong: ``the streamed scan reads the weights``.

    Raises:
        CheckpointError: it is quantised, or its config says so and its weights are plain.
    """
    found = quantisation_of(reader)
    if found is None:
        return
    if found.stored:
        raise CheckpointError(
            f"{reader.folder} is quantised ({found.method}), and {what}: this is not supported; "
            "give the model without quantisation. (Recipes that only drop layers by their place, "
            "such as first_layers and last_layers, accept it.)"
        )
    if not is_ignored(found):
        raise CheckpointError(
            f"The config of {reader.folder} says quant_method '{found.method}', and its weights "
            "are not quantised; remove quantization_config from config.json."
        )


def require_package(pretrained: str | Path) -> None:
    """Refuse a quantised checkpoint that transformers cannot load here.

    Args:
        pretrained: folder; a name on the hub is left to transformers.

    Raises:
        MissingDependencyError: the package that reads it is not installed; with the pip line.
        CheckpointError: transformers would read its codes as weights.
    """
    from streamline_bench.core.checkpoint.reader import CheckpointReader

    folder = Path(pretrained)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return
    found = quantisation_of(CheckpointReader(folder))
    if found is None:
        return
    if found.stored and not _is_known(found.method):
        raise CheckpointError(
            f"{folder} is quantised ({found.method}), which transformers does not read: it "
            "would use the codes as weights; evaluate it with --model streamline-vllm, or give "
            "the model without quantisation."
        )
    module, pip = _PACKAGES.get(found.method, ("", ""))
    if module and not _is_installed(module):
        raise MissingDependencyError(
            f"{folder} is quantised ({found.method}), and the package that reads it is not "
            f"installed; run: pip install {pip}."
        )


def renumbered(settings: Any, keep: Sequence[int]) -> Any:
    """Return quantisation settings for a model with only the layers in ``keep``.

    Names of modules, in lists and as keys, follow their layers; those of removed layers go.

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
    if _SEVERAL.search(name):
        raise ArchitectureError(
            f"The quantisation settings name several layers by the pattern '{name}', which cannot "
            "be renumbered when layers are removed; list the layers in config.json."
        )
    found = _LAYER.search(name)
    if found is None:
        return name
    layer = int(found["layer"])
    if layer not in keep:
        return None
    number = list(keep).index(layer)
    return f"{name[: found.end('before')]}{number}{name[found.start('after') :]}"


def _settings(reader: CheckpointReader) -> Mapping[str, Any] | None:
    """What the files say: the config's entry, an older spelling of it, or modelopt's own file."""
    text = reader.config.get("text_config")
    for config in (reader.config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(config.get(key), Mapping) and config[key]:
                return dict(config[key])
    path = reader.folder / MODELOPT_NAME
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["quantization"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is not readable; download it again.") from None
    # transformers does not look at this file; plain weights beside it are plain weights.
    return found if isinstance(found, Mapping) and found.get("quant_algo") else None


def _is_code(entry: TensorEntry) -> bool:
    if entry.name.endswith(_CODES):
        return True
    whole = entry.dtype in ("I8", "U8") or entry.dtype.startswith("F8")
    return whole and len(entry.shape) > 1 and not _SCALES.search(entry.name)


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


def _is_known(method: str) -> bool:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    return method in {
        name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING
    }


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False
