"""Loads configs, tokenizers and models from a local folder: safetensors only, no remote code.

:class:`SourceModel` is the model that is compressed: found once, each part read and hashed once.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from streamline_bench.core.architecture import architecture_of, config_entry
from streamline_bench.core.checkpoint.folder import (
    VOCABULARY_FILES,
    file_sha256,
    read_config,
    resolve_pretrained,
)
from streamline_bench.core.checkpoint.quantization import is_known, plain_config
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.wrapper import Wrapper, may_be_wrapper, text_config_of
from streamline_bench.core.checkpoint.writer import layers_prefix
from streamline_bench.core.files import read_json
from streamline_bench.errors import (
    CalibrationError,
    CheckpointError,
    MissingDependencyError,
    RecipeError,
    library_errors,
)

log = logging.getLogger(__name__)

_PACKAGES = {
    "gptq": ("gptqmodel", "gptqmodel optimum"), "awq": ("gptqmodel", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"), "aqlm": ("aqlm", "'aqlm[gpu,cpu]'"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"), "eetq": ("eetq", "eetq"),
    "auto-round": ("auto_round", "auto-round"), "fbgemm_fp8": ("fbgemm_gpu", "fbgemm-gpu"),
    "hqq": ("hqq", "hqq"), "quanto": ("optimum.quanto", "optimum-quanto"),
    "quark": ("quark", "amd-quark"), "spqr": ("spqr_quant", "'spqr_quant[gpu]'"),
    "torchao": ("torchao", "torchao"), "vptq": ("vptq", "vptq"),
}  # fmt: skip
"""Method -> module that transformers needs to load it, and what ``pip install`` takes."""


def dtype_name(dtype: object) -> str:
    """Return torch's name of the dtype to compute in; None and ``auto`` stand for float32.

    Raises:
        RecipeError: there is no such floating-point dtype.
    """
    import torch

    if dtype is None or dtype == "auto":
        return "float32"
    name = str(dtype).removeprefix("torch.")
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise RecipeError(
            f"'{name}' is not a dtype to compute in; give float32, bfloat16 or float16 as dtype."
        )
    return str(found).removeprefix("torch.")  # "half" is float16


def computing_dtype(dtype: object, device: str, reader: CheckpointReader) -> str:
    """Return torch's name of the dtype to compute in on a device.

    Sums over tokens are taken in float32 or better whatever it is.

    Args:
        dtype: None or ``auto``: on an accelerator that of most of the stored weights, if it is
            bfloat16 or float16; else float32, which every CPU computes fast.

    Raises:
        RecipeError: there is no such floating-point dtype.
    """
    if dtype not in (None, "auto") or device.startswith("cpu"):
        return dtype_name(dtype)
    sizes: Counter[str] = Counter()
    for name in reader.parameter_names:
        entry = reader.entry(name)
        sizes[entry.dtype] += entry.numel
    stored = sizes.most_common(1)[0][0] if sizes else ""
    return {"BF16": "bfloat16", "F16": "float16"}.get(stored, "float32")


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a checkpoint folder, made to agree with its weights.

    That of a multimodal folder is the config of its text model.

    ``tie_word_embeddings`` is what transformers makes of the stored tensors
    (:attr:`.CheckpointReader.tied`), and a ``quantization_config`` over plain weights that
    transformers ignores is left out.

    Raises:
        CheckpointError: the config cannot be read or its model type is unknown.
    """
    from transformers import AutoConfig

    from streamline_bench.modeling import register

    register()
    stored = next(folder.glob("*.safetensors"), None) is not None
    reader = CheckpointReader(folder) if stored else None
    if reader is None:
        config = text_config_of(folder, read_config(folder))
    else:
        config = reader.wrapper.text_config() if reader.wrapper else None
    if config is not None:
        config.name_or_path = str(folder)
    else:
        with library_errors(
            f"{folder}: the config cannot be loaded", "correct config.json", CheckpointError
        ):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if reader is None and getattr(config, "text_config", None) is not None:
        config = config.get_text_config(decoder=True)
    if type(config).__module__.startswith("transformers_modules"):
        architecture_of(config)  # so that the folder's plain config.json is known from now on
    if reader is not None:
        _agree(config, reader)
    return config


def _agree(config: Any, reader: CheckpointReader) -> None:
    if getattr(config, "tie_word_embeddings", False) and not reader.tied:
        log.warning(
            "%s stores an LM head that differs from its embeddings, so that they are not tied, "
            "although config.json says so.",
            reader.folder,
        )
        config.tie_word_embeddings = False
    found = reader.quantisation
    if found is not None and found.ignored:
        log.warning(
            "%s has plain weights: the quantisation settings (%s) are ignored, as transformers "
            "ignores them.",
            reader.folder,
            found.method,
        )
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config


def stored_overrides(pretrained: str) -> dict[str, Any]:
    """Return the entries in which a local ``config.json`` contradicts the stored weights.

    vLLM believes the config: it would drop an LM head that is stored as well as the embeddings.
    """
    folder = Path(pretrained)
    if not (folder / "config.json").is_file():
        return {}
    reader = CheckpointReader(folder)
    wrong = config_entry(reader.config, "tie_word_embeddings") and not reader.tied
    return {"tie_word_embeddings": False} if wrong else {}


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a checkpoint folder.

    Raises:
        CalibrationError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in VOCABULARY_FILES):
        raise CalibrationError(
            f"{folder} has no tokenizer (none of {', '.join(VOCABULARY_FILES)}); "
            "save the model's tokenizer into that folder."
        )
    with library_errors(
        f"{folder}: the tokenizer cannot be loaded", "save it again", CalibrationError
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    name_other_templates(folder, tokenizer)
    return tokenizer


def name_other_templates(name: object, tokenizer: Any) -> None:
    """Warn if the tokenizer's folder has chat templates that differ: transformers takes one.

    Args:
        name: what the tokenizer was loaded from; only a folder is looked at.
    """
    if not isinstance(name, str | Path) or not Path(name).is_dir():
        return
    folder, used = Path(name), getattr(tokenizer, "chat_template", None)
    found: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).is_file():
            payload = read_json(folder / name, CalibrationError, "save the tokenizer again")
            found[name] = payload.get("chat_template") if isinstance(payload, Mapping) else None
    if (folder / "chat_template.jinja").is_file():
        found["chat_template.jinja"] = (folder / "chat_template.jinja").read_text("utf-8")
    others = [name for name, text in found.items() if isinstance(text, str) and text != used]
    if others:
        taken = [name for name, text in found.items() if text == used] or ["none"]
        log.warning(
            "%s has several chat templates: that of %s is used; that of %s differs and is left "
            "out.", folder, taken[0], ", ".join(others),
        )  # fmt: skip


def load_model(
    folder: Path,
    *,
    device: str,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    streamed: bool = False,
) -> Any:
    """Return the causal LM of a folder on ``device``, in evaluation mode.

    Quantised weights are decoded (:mod:`.codes`): the model is a plain one.

    Args:
        streamed: read each layer when it runs (:mod:`streamline_bench.core.streaming`).

    Raises:
        CheckpointError: it cannot be loaded, is quantised in an unknown format, or lacks weights.
        ResourceError: the memory of the device does not suffice.
    """
    import torch

    reader = CheckpointReader(folder)
    reader.refuse_quantised("its weights would be changed or computed with")
    config = load_config(folder, trust_remote_code=trust_remote_code)
    what = f"{folder}: the model cannot be loaded"
    if streamed:
        from streamline_bench.core.streaming import streamed_model

        with library_errors(what, "check the files of the model", CheckpointError):
            return streamed_model(
                folder,
                plain_config(config) if reader.coded else config,
                device=device,
                dtype=getattr(torch, dtype_name(dtype)),
                trust_remote_code=trust_remote_code,
            )
    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype_name(dtype)), "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are refused by name below
    }  # fmt: skip
    trust = {"trust_remote_code": trust_remote_code}
    with library_errors(what, "check the files of the model", CheckpointError):
        if reader.coded:
            from transformers import AutoModelForCausalLM

            config = plain_config(config)
            with torch.device("meta"):
                kind = type(AutoModelForCausalLM.from_config(config, **trust))
            state = {name: _Decoded(reader, name, options["dtype"]) for name in reader.names}
            model, report = kind.from_pretrained(None, config=config, state_dict=state, **options)
        else:
            model, report = CausalLM.from_pretrained(
                folder, config=config, use_safetensors=True, **options, **trust
            )
    require_weights(folder, report)
    with library_errors(f"{folder}: the model cannot be moved to {device}", kind=CheckpointError):
        return model.to(device).eval()


class CausalLM:
    """Loads what ``AutoModelForCausalLM`` does, and of a multimodal folder its text model alone."""

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *args: Any, config: Any = None, **options: Any
    ) -> Any:
        """Return the model; arguments are those of ``AutoModelForCausalLM.from_pretrained``."""
        from transformers import AutoModelForCausalLM

        reader = None if options.get("gguf_file") else multimodal_reader(name, options)
        if reader is None:
            given = {} if config is None else {"config": config}
            return AutoModelForCausalLM.from_pretrained(name, *args, **given, **options)
        folder, wrapper = reader.folder, reader.wrapper
        assert wrapper is not None
        config = load_config(folder) if config is None else config
        for key in ("revision", "subfolder", "gguf_file"):
            options.pop(key, None)
        return _text_class(config, wrapper).from_pretrained(
            folder, *args, config=config, key_mapping=wrapper.key_mapping(), **options
        )


def multimodal_reader(name: str | Path, options: Mapping[str, Any]) -> CheckpointReader | None:
    """Return the reader of a multimodal model, downloaded if need be; None for any other model.

    Args:
        name: folder or hub id.
        options: what else ``from_pretrained`` is given: ``revision`` and ``subfolder`` count.

    Raises:
        CheckpointError: it is one, and cannot be downloaded or read.
    """
    from transformers.utils import cached_file

    from streamline_bench.modeling import register

    place = {key: options[key] for key in ("revision", "subfolder") if options.get(key)}
    with suppress(OSError):  # no config: the caller's loader says so
        path = cached_file(str(name), "config.json", **place)
        config = read_json(Path(path), CheckpointError, "download it again")
        if isinstance(config, Mapping) and may_be_wrapper(config):
            register()
            folder = Path(path).parent
            if not Path(name).is_dir():
                folder = resolve_pretrained(name, place.get("revision"))
            reader = CheckpointReader(folder)
            return reader if reader.wrapper else None
    return None


def _text_class(config: Any, wrapper: Wrapper) -> Any:
    """The class of a text model; the wrapper's other tensors are none of its business."""
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM._model_mapping[type(config)]
    if getattr(config, "host_model_type", None):
        from streamline_bench.modeling.models import StreamlineForCausalLM, model_class_for

        kind = model_class_for(StreamlineForCausalLM, config.host_model_type)
    patterns = [rf"^{re.escape(path)}(\.|$)" for path in wrapper.outer_modules]
    ignored = [*(kind._keys_to_ignore_on_load_unexpected or ()), *patterns]
    same = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**same, "_keys_to_ignore_on_load_unexpected": ignored})


class _Decoded:
    """A tensor that is read, and decoded, when transformers asks for it."""

    def __init__(self, reader: CheckpointReader, name: str, dtype: Any) -> None:
        self._read = partial(reader.tensor, name, dtype)

    def __getitem__(self, index: Any) -> Any:
        return self._read()[index]


def require_weights(name: object, report: Mapping[str, Any]) -> None:
    """Refuse a model some of whose weights are random: not in its checkpoint, or of other shapes.

    Args:
        report: what ``from_pretrained`` returns with ``output_loading_info``.

    Raises:
        CheckpointError: naming some of them.
    """
    if report.get("mismatched_keys"):
        name_of, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise CheckpointError(
            f"{name}: '{name_of}' is stored with shape {list(stored)}, and the config makes it "
            f"{list(wanted)}; correct config.json, or download the files again."
        )
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise CheckpointError(f"{name}: the checkpoint lacks weights that the model needs: {some}.")


def require_package(pretrained: str | Path) -> None:
    """Refuse a quantised checkpoint that transformers cannot load here.

    Args:
        pretrained: folder; a name on the hub is left to transformers.

    Raises:
        MissingDependencyError: the package that reads it is not installed; with the pip line.
        CheckpointError: transformers would read its codes as weights.
    """
    folder = Path(pretrained)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return
    found = CheckpointReader(folder).quantisation
    if found is None:
        return
    if found.stored and not is_known(found.method):
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


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def _refuse_unsupported(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse a family from its ``config.json`` alone; other files may not be there yet."""
    config = read_config(folder)
    if trust_remote_code and "auto_map" in config:
        return  # the code decides
    text = text_config_of(folder, config)
    architecture_of(config if text is None else text)


def check_layers(reader: CheckpointReader) -> None:
    """Compare the layers that are stored with the config, and name what it does not know.

    Raises:
        CheckpointError: the config counts layers that are not stored.
    """
    if (depth := reader.depth) is None:
        return
    family = architecture_of(reader.config)
    pattern = re.compile(rf"{re.escape(layers_prefix(reader, family))}\.(\d+)\.")
    stored = {int(found[1]) for name in reader.names if (found := pattern.match(name))}
    lacking = sorted(set(range(depth)) - stored)
    if lacking:
        raise CheckpointError(
            f"{reader.folder}: config.json has {family.depth_key}={depth}, and the weights of "
            f"layer {lacking[0]} are missing; correct config.json, or download the model again."
        )
    beyond = sorted(layer for layer in stored if layer >= depth)
    if beyond:
        log.warning(
            "%s holds layers %d to %d beyond the %d of its config; transformers ignores them, and "
            "they are neither counted nor kept where layers are removed.",
            reader.folder, beyond[0], beyond[-1], depth,
        )  # fmt: skip
    others = [name for name in reader.extra_names if not pattern.match(name)]
    if others:
        log.warning(
            "%s holds %d tensors that are not of its model (%s, …); they are copied and not "
            "counted.", reader.folder, len(others), others[0],
        )  # fmt: skip


@dataclass(frozen=True)
class SourceModel:
    """A model folder, handed along so that nobody looks at it twice.

    Attributes:
        folder: the local folder.
        trust_remote_code: let config and tokenizer run code from the folder.
        progress: show how far the work is.
        name, revision: what a user called it.
    """

    folder: Path
    trust_remote_code: bool = False
    progress: bool = True
    name: str = ""
    revision: str | None = None
    _digests: dict[Path, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def find(
        cls,
        name: str | Path,
        revision: str | None = None,
        *,
        trust_remote_code: bool = False,
        progress: bool = True,
        changed: bool = True,
    ) -> SourceModel:
        """Return the model of a folder, a hub id or ``bundled``.

        Args:
            changed: it will be compressed. A family that is not supported is then refused from its
                config alone, before weights are downloaded, and layers are checked against the
                config.

        Raises:
            CheckpointError: there is no such model, or it lacks layers of its config.
            ArchitectureError: its family is not supported.
        """
        check = partial(_refuse_unsupported, trust_remote_code=trust_remote_code)
        folder = resolve_pretrained(name, revision, check if changed else None)
        found = cls(folder, trust_remote_code, progress, str(name), revision)
        if changed:
            check_layers(found.reader)
        return found

    @cached_property
    def reader(self) -> CheckpointReader:
        """The tensors, lazily read."""
        return CheckpointReader(self.folder)

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 (hex) of config and weights, however they are sharded."""
        return self.reader.fingerprint(progress=self.progress)

    @cached_property
    def config(self) -> Any:
        """The transformers config."""
        return load_config(self.folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)

    def file_sha256(self, path: Path) -> str:
        """Return the SHA-256 (hex) of a file of the model or of its data; each is read once.

        Raises:
            CheckpointError: it cannot be read.
        """
        if path not in self._digests:
            try:
                self._digests[path] = file_sha256(path)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from None
        return self._digests[path]
