"""Makes transformers' Auto classes know the ``streamline`` model type."""

from __future__ import annotations

from functools import cache

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from streamline_bench.modeling.configuration import MODEL_TYPE, StreamlineConfig, on_new_host
from streamline_bench.modeling.models import StreamlineForCausalLM, StreamlineModel

__all__ = ["register"]


@cache
def register() -> None:
    """Register config and models with AutoConfig, AutoModel and AutoModelForCausalLM.

    Idempotent. Afterwards ``AutoModelForCausalLM.from_pretrained(folder)`` loads any checkpoint of
    model type ``streamline``.
    """
    AutoConfig.register(MODEL_TYPE, StreamlineConfig, exist_ok=True)
    _register_models(StreamlineConfig)
    on_new_host(_register_models)


def _register_models(config_class: type[StreamlineConfig]) -> None:
    # The Auto classes look models up by the config's exact class, hence once per host. Their own
    # ``register`` insists on equal class names, which made classes cannot have.
    AutoModel._model_mapping.register(config_class, StreamlineModel, exist_ok=True)
    AutoModelForCausalLM._model_mapping.register(config_class, StreamlineForCausalLM, exist_ok=True)
