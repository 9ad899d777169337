"""How vLLM learns the sizes of a checkpoint: what it asks of every model type, for ours."""

from __future__ import annotations

from typing import Any

from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from streamline_bench.core.architecture import architecture_of
from streamline_bench.modeling.vllm.routes import architecture_for
from streamline_bench.modeling.widths import LayerConfig, head_size

_SAVED_AS = ["StreamlineForCausalLM"]
_STOCK_QWEN2 = ["Qwen2ForCausalLM"]
_BACKEND = "TransformersForCausalLM"


class StreamlineConvertor(ModelArchConfigConvertorBase):  # type: ignore[misc]
    """Reads attention sizes layer by layer, and chooses the class that serves the model.

    The class is written into the config, because vLLM's loader looks it up there once more. With
    ``hf_overrides={"architectures": [...]}`` a user chooses instead.

    Raises:
        ArchitectureError: no class serves this host family.
    """

    def __init__(self, hf_config: Any, hf_text_config: Any, revision: str | None = None) -> None:
        super().__init__(hf_config, hf_text_config, revision)
        if hf_config.architectures == _SAVED_AS:
            hf_config.architectures = [architecture_for(hf_config)]

    def get_per_layer_hf_configs(self) -> list[tuple[Any, Any]] | None:
        """Return each layer's view of the config, None if all layers have the same widths."""
        config = self.hf_config
        widths = config.parsed_layer_widths()
        if not widths:
            return None
        row = architecture_of(config)
        shared = {"head_dim": head_size(config)}
        views = [LayerConfig(config, {**shared, **own.entries(row)}) for own in widths]
        return [(view, view) for view in views]

    def get_head_size(self) -> int:
        """Return the width of one head, which is the same in all layers."""
        return head_size(self.hf_config)


class Qwen2Convertor(ModelArchConfigConvertorBase):  # type: ignore[misc]
    """Stock Qwen 2 with heads removed in all layers alike runs on the transformers backend.

    vLLM's class takes the hidden size by the number of heads for the head size, which only holds
    while all heads are there.
    """

    def __init__(self, hf_config: Any, hf_text_config: Any, revision: str | None = None) -> None:
        super().__init__(hf_config, hf_text_config, revision)
        derived = hf_config.hidden_size // hf_config.num_attention_heads
        if hf_config.architectures == _STOCK_QWEN2 and head_size(hf_config) != derived:
            hf_config.architectures = [_BACKEND]
