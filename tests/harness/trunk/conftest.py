"""Variants of tiny models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

Variant = Callable[..., Path]


@pytest.fixture(scope="session")
def make_variant(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """Return a function that saves a model with some layers kept, or changed.

    ``make_variant(dense, [0, 1, 4, 5], attach=(1, "swiglu_res"))`` keeps four layers and puts a
    random network behind the second; ``edit`` is called with the model before it is saved.
    """

    def make(
        dense: Path,
        keep: Sequence[int],
        *,
        attach: tuple[int, str] | None = None,
        edit: Callable[[Any], None] | None = None,
        seed: int = 7,
        **saving: Any,
    ) -> Path:
        import torch
        from surgery_in_memory import keep_layers
        from transformers import AutoModelForCausalLM

        from streamline_bench.modeling import Attachment, StreamlineForCausalLM, streamline_config

        model = AutoModelForCausalLM.from_pretrained(dense)
        keep_layers(model, list(keep))
        if attach is not None:
            torch.manual_seed(seed)
            after, kind = attach
            config = streamline_config(model.config, [Attachment(after, kind, 32)])
            hosted = StreamlineForCausalLM.from_config(config)
            hosted.load_state_dict(model.state_dict(), strict=False)
            model = hosted
        if edit is not None:
            with torch.no_grad():
                edit(model)
        folder = tmp_path_factory.mktemp("variant")
        model.save_pretrained(folder, **saving)
        for path in [*dense.glob("tokenizer*"), *dense.glob("special_tokens*")]:
            shutil.copy(path, folder)
        return folder

    return make
