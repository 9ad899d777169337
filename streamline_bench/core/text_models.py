"""A causal LM for text models that transformers knows inside a multimodal wrapper only.

Qwen-VL's text models, for example, have a config and a model class of their own and no class with
an LM head. The class made here puts a plain head on the wrapper's own text model, as the wrapper
does, so that logits are the wrapper's by construction.
"""

from __future__ import annotations

from typing import Any

from streamline_bench.errors import ArchitectureError


def ensure_causal_lm(config: Any, wrapper_type: str) -> None:
    """Let ``AutoModelForCausalLM`` know a class for a text config, making one where there is none.

    Args:
        config: transformers config of the text model.
        wrapper_type: model type of the folder that it is in.

    Raises:
        ArchitectureError: transformers has no class of the bare text model either.
    """
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

    kind = type(config)
    if kind in AutoModelForCausalLM._model_mapping:
        return
    listed = AutoModelForCausalLM._model_mapping.get(CONFIG_MAPPING[wrapper_type], None)
    if listed is not None and listed.config_class is kind:  # Emu3's, listed under its wrapper
        AutoModelForCausalLM._model_mapping.register(kind, listed, exist_ok=True)
        return
    if kind not in AutoModel._model_mapping:
        raise ArchitectureError(
            f"Model type '{wrapper_type}' is not supported: transformers cannot build its text "
            f"model ('{config.model_type}') alone; use another model."
        )
    made = _with_head(AutoModel._model_mapping[kind])
    _share_conversions(made.__name__, wrapper_type)
    AutoModelForCausalLM._model_mapping.register(kind, made, exist_ok=True)


def _with_head(text_model: Any) -> Any:
    from torch import nn
    from transformers import GenerationMixin, LlamaForCausalLM

    family = next(kind for kind in text_model.__mro__[1:] if kind.__name__ != "PreTrainedModel")

    class TextForCausalLM(family, GenerationMixin):  # type: ignore[misc,valid-type]
        """The text model of a wrapper with an LM head."""

        base_model_prefix = "model"
        config_class = text_model.config_class
        input_modalities = ("text",)
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = text_model(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        forward = LlamaForCausalLM.forward

    name = text_model.__name__.removesuffix("Model").removesuffix("Text") + "TextForCausalLM"
    TextForCausalLM.__name__ = TextForCausalLM.__qualname__ = name
    return TextForCausalLM


def _share_conversions(name: str, wrapper_type: str) -> None:
    """Let weights that the wrapper's files hold in another layout (fused experts) load as its own.

    Its renamings of whole prefixes are of no use here.
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import WeightConverter

    rules = get_checkpoint_conversion_mapping(wrapper_type) or []
    layouts = [rule for rule in rules if isinstance(rule, WeightConverter)]
    register_checkpoint_conversion_mapping(name, layouts, overwrite=True)
