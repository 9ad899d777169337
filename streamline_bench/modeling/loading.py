"""Loads configs, tokenizers and models from a local folder: safetensors only, no remote code."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamline_bench.core.architecture import config_entry
from streamline_bench.core.checkpoint.folder import VOCABULARY_FILES
from streamline_bench.core.checkpoint.quantization import is_ignored, quantisation_of
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.files.structured import read_json
from streamline_bench.errors import CalibrationError, CheckpointError, RecipeError, library_errors

log = logging.getLogger(__name__)


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


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a checkpoint folder, made to agree with its weights.

    ``tie_word_embeddings`` is what transformers makes of the stored tensors
    (:attr:`.CheckpointReader.tied`), and a ``quantization_config`` over plain weights that
    transformers ignores is left out.

    Raises:
        CheckpointError: the config cannot be read or its model type is unknown.
    """
    from transformers import AutoConfig

    from streamline_bench.modeling import register

    register()
    with library_errors(
        f"{folder}: the config cannot be loaded", "correct config.json", CheckpointError
    ):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if next(folder.glob("*.safetensors"), None) is not None:
        _agree(config, CheckpointReader(folder))
    return config


def _agree(config: Any, reader: CheckpointReader) -> None:
    if getattr(config, "tie_word_embeddings", False) and not reader.tied:
        log.warning(
            "%s stores an LM head that differs from its embeddings, so that they are not tied, "
            "although config.json says so.",
            reader.folder,
        )
        config.tie_word_embeddings = False
    found = quantisation_of(reader)
    if found is not None and is_ignored(found):
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

    vLLM believes the config: it would drop an LM head that is stored beside the embeddings.
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
    _name_other_templates(folder, tokenizer.chat_template)
    return tokenizer


def _name_other_templates(folder: Path, used: object) -> None:
    """transformers takes the template of one file, whatever the others say."""
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
    folder: Path, *, device: str, dtype: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Return the causal LM of a folder on ``device``, in evaluation mode.

    Raises:
        CheckpointError: it cannot be loaded, is quantised, or lacks weights.
        ResourceError: the memory of the device does not suffice.
    """
    import torch
    from transformers import AutoModelForCausalLM

    CheckpointReader(folder).refuse_quantised("its weights would be changed or computed with")
    config = load_config(folder, trust_remote_code=trust_remote_code)
    what = f"{folder}: the model cannot be loaded"
    with library_errors(what, "check the files of the model", CheckpointError):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype_name(dtype)),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    require_weights(folder, report)
    with library_errors(f"{folder}: the model cannot be moved to {device}", kind=CheckpointError):
        return model.to(device).eval()


def require_weights(name: object, report: Mapping[str, Any]) -> None:
    """Refuse a model some of whose weights were not in its checkpoint, and are random.

    Args:
        report: what ``from_pretrained`` returns with ``output_loading_info``.

    Raises:
        CheckpointError: naming some of them.
    """
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise CheckpointError(f"{name}: the checkpoint lacks weights that the model needs: {some}.")
