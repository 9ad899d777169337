"""What the configs beside a checkpoint say: how long an input may be, and what to pad with."""

from __future__ import annotations

from streamline_bench.errors import CheckpointError
from streamline_bench.opencompass.source import ModelSource

__all__ = ["generation_pad", "longest_input"]


def generation_pad(source: ModelSource) -> int | None:
    """Return the padding token of the generation config, if it names one."""
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(
            source.prepared.pretrained, revision=source.revision or "main"
        )
    except (OSError, ValueError):
        return None
    return config.pad_token_id  # type: ignore[no-any-return]


def longest_input(source: ModelSource) -> int:
    """Return the most tokens the model reads, by its config.

    Raises:
        CheckpointError: the config does not say.
    """
    from transformers import AutoConfig

    from streamline_bench.modeling import register

    register()
    config = AutoConfig.from_pretrained(
        source.prepared.pretrained,
        revision=source.revision or "main",
        trust_remote_code=source.trust_remote_code,
    ).get_text_config()
    for key in ("max_position_embeddings", "n_positions", "seq_length", "model_max_length"):
        length = getattr(config, key, None)
        if isinstance(length, int) and length > 0:
            return length
    raise CheckpointError(
        f"The config of {source.prepared.pretrained} names no input length; set max_seq_len in "
        "the model's entry."
    )
