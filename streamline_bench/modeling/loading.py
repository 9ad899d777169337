"""Loads configs, tokenizers and models from a local folder: safetensors only, no remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamline_bench.core.checkpoint.folder import VOCABULARY_FILES
from streamline_bench.core.recipe.validation import first_line
from streamline_bench.errors import CalibrationError, CheckpointError, RecipeError

__all__ = ["dtype_name", "load_config", "load_model", "load_tokenizer"]


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
            f"'{name}' is no dtype to compute in; give float32, bfloat16 or float16 as dtype."
        )
    return str(found).removeprefix("torch.")  # "half" is float16


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a checkpoint folder.

    Raises:
        CheckpointError: the config cannot be read or its model type is unknown.
    """
    from transformers import AutoConfig

    from streamline_bench.modeling import register

    register()
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: the config cannot be loaded ({first_line(error)})."
        ) from None


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
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"{folder}: the tokenizer cannot be loaded ({first_line(error)})."
        ) from None


def load_model(
    folder: Path, *, device: str, dtype: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Return the causal LM of a folder on ``device``, in evaluation mode.

    Raises:
        CheckpointError: it cannot be loaded, or weights are missing for it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from streamline_bench.modeling import register

    register()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype_name(dtype)),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: the model cannot be loaded ({first_line(error)})."
        ) from None
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise CheckpointError(f"{folder}: the checkpoint lacks weights the model needs: {some}.")
    return model.to(device).eval()
