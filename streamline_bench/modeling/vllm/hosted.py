"""Our model type on vLLM's transformers backend, which runs the modules of transformers.

It puts vLLM's attention, linear maps, norms and embeddings in the place of transformers', so that
all that :mod:`streamline_bench.modeling.models` builds is served: networks at any place, heads and
channels of each layer's own, and sliced residual streams.
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from streamline_bench.errors import ArchitectureError
from streamline_bench.modeling.models import share_conversions
from streamline_bench.modeling.rotations import Rotations


class StreamlineTransformersForCausalLM(TransformersForCausalLM):  # type: ignore[misc]
    """Any checkpoint of model type ``streamline`` of a host family that is served."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        rotations: Rotations | None = config.parsed_rotations()
        stages = vllm_config.parallel_config.pipeline_parallel_size
        if rotations is not None and stages > 1:
            raise ArchitectureError(
                f"A model with a sliced residual stream cannot be split into {stages} pipeline "
                "stages; use tensor parallelism."
            )
        # vLLM looks up the names of older checkpoints (GPT-NeoX's embed_out) by this class's name.
        host = config.host_model_type
        share_conversions(type(self).__name__, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[host], host)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if rotations is not None:
            # The backend takes the head to be as wide as the config's hidden size, which is the
            # width before slicing. Sliced models are never tied.
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                rotations.head_width,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
