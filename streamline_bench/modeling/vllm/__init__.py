"""What vLLM needs to serve checkpoints of model type ``streamline``; no remote code is involved.

vLLM calls :func:`register` in its front end, its engine process and its workers (entry point
``vllm.general_plugins``). Checkpoints of stock model types need nothing of this.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make config, model classes and per-layer sizes of our checkpoints known; idempotent.

    Model classes are named, not imported: vLLM imports the one that it needs, in the process that
    runs it, after it has chosen a device.
    """
    from vllm import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from streamline_bench.modeling import register as register_with_transformers
    from streamline_bench.modeling.configuration import MODEL_TYPE
    from streamline_bench.modeling.vllm.convertor import Qwen2Convertor, StreamlineConvertor
    from streamline_bench.modeling.vllm.routes import HOSTED, NATIVE

    register_with_transformers()
    MODEL_ARCH_CONFIG_CONVERTORS[MODEL_TYPE] = StreamlineConvertor
    MODEL_ARCH_CONFIG_CONVERTORS.setdefault("qwen2", Qwen2Convertor)
    ModelRegistry.register_model(HOSTED, f"{__name__}.hosted:{HOSTED}")
    for architecture in NATIVE.values():
        ModelRegistry.register_model(architecture, f"{__name__}.native:{architecture}")
