"""From the keys of an OpenCompass model entry to the checkpoint that is loaded, and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamline_bench.errors import CheckpointError, StreamlineBenchError, library_errors
from streamline_bench.harness.arguments import parameters_of, sort_arguments
from streamline_bench.harness.preparation import PreparedModel, prepare


class _Loading:
    """Names the keys that say where a model comes from, for :func:`sort_arguments`."""

    def __init__(
        self, pretrained: str, device: str, dtype: str, revision: str, trust_remote_code: bool
    ) -> None: ...


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint and how to load it.

    Attributes:
        prepared: folder or hub id, and its manifest if it is a compressed one.
        device: torch device, None for the best there is.
        dtype: name of a torch dtype, or ``auto`` for the checkpoint's own.
        revision: of a hub model.
        trust_remote_code: run code that the model brings along.
        options: everything else that goes to ``from_pretrained``.
    """

    prepared: PreparedModel
    device: str | None
    dtype: str
    revision: str | None
    trust_remote_code: bool
    options: Mapping[str, Any]


def entry_source(
    path: str,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    for_vllm: bool = False,
    **options: Any,
) -> ModelSource:
    """Compress on first use if a recipe is given, and find the result in the cache afterwards.

    Args:
        path: folder or hub id.
        model_kwargs: more of ``options``; for vLLM, arguments of ``vllm.LLM``, which checks them
            itself.
        overrides: dotted keys of the recipe, which keyword arguments cannot spell.
        **options: ``recipe``, ``sparsity`` and other keys of recipes, ``cache``, ``device``,
            ``dtype``, and arguments of ``from_pretrained``.

    Raises:
        StreamlineBenchError: an unknown key, or a recipe or model that cannot be used.
    """
    loading = _plain(model_kwargs or {})
    given = {**options, **({} if for_vllm else loading), **(overrides or {})}
    given = {key: value for key, value in _plain(given).items() if value is not None}
    arguments = sort_arguments({"pretrained": str(path), **given}, parameters_of(_Loading))
    prepared = prepare(arguments)
    rest = {**arguments.harness, **(loading if for_vllm else {})}
    rest.pop("pretrained")
    # "dtype" is what transformers calls "torch_dtype" since version 4.56.
    named = rest.pop("torch_dtype", "auto")
    dtype = str(rest.pop("dtype", named)).removeprefix("torch.")
    revision = rest.pop("revision", None)
    return ModelSource(
        prepared=prepared,
        device=rest.pop("device", None),
        dtype=dtype,
        # The revision was that of the source; a compressed checkpoint is a folder.
        revision=None if prepared.key is not None else revision,
        trust_remote_code=bool(rest.pop("trust_remote_code", False)),
        options=rest,
    )


def _plain(value: Any) -> Any:
    """Undo the mapping and list classes of mmengine's configs."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def generation_pad(source: ModelSource) -> int | None:
    """Return the padding token of the generation config, if it names one."""
    from transformers import GenerationConfig

    try:
        with library_errors("The generation config"):
            config = GenerationConfig.from_pretrained(
                source.prepared.pretrained, revision=source.revision or "main"
            )
    except StreamlineBenchError:
        return None  # most models have none
    return config.pad_token_id  # type: ignore[no-any-return]


def longest_input(source: ModelSource) -> int:
    """Return the most tokens the model reads, by its config.

    Raises:
        CheckpointError: the config does not say.
    """
    from transformers import AutoConfig

    from streamline_bench.modeling import register

    register()
    name = source.prepared.pretrained
    with library_errors(f"{name}: the config cannot be loaded", kind=CheckpointError):
        config = AutoConfig.from_pretrained(
            name,
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
