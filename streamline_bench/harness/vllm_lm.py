"""``--model streamline-vllm``: the harness's vLLM model, for compressed models.

It takes what ``--model streamline`` takes, where vLLM has it, and vLLM's own arguments; a recipe's
result is found in the same cache. Scores are those of the harness's vLLM class. Generated text is
decoded from the new tokens alone, as the harness does for transformers: vLLM decodes it behind its
prompt, which with some tokenizers puts a space in front of every answer.
"""

from __future__ import annotations

import dataclasses
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from streamline_bench.harness.model_creation import user_errors
from streamline_bench.modeling.vllm.package import require_vllm

with user_errors():  # the harness's class cannot even be imported without
    require_vllm("--model streamline-vllm")

from lm_eval.models.vllm_causallms import VLLM
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import CheckpointError
from streamline_bench.harness.answer_tokens import count_answer
from streamline_bench.harness.arguments import parameters_of, sort_arguments
from streamline_bench.harness.model_creation import CompressedModel, files_sha256, model_identity
from streamline_bench.harness.preparation import prepare
from streamline_bench.modeling.loading import name_other_templates, stored_overrides
from streamline_bench.modeling.vllm import register

_ENGINE_ARGUMENTS = [*(entry.name for entry in dataclasses.fields(EngineArgs)), "device"]
_SIZES = ("kv_cache_memory_bytes", "gpu_memory_utilization", "max_num_seqs")
"""Arguments that change how much runs at once, and no answer."""

_CPU_CACHE_SHARE = 4
_CPU_CACHE_MOST = 8 * 2**30


class StreamlineVLLM(CompressedModel, VLLM):  # type: ignore[misc]
    """A causal language model served by vLLM in this process, compressed if a recipe is given.

    Args:
        **arguments: those of ``lm_eval.models.vllm_causallms.VLLM``, of vLLM's ``EngineArgs``, and
            ``recipe``, ``sparsity``, … as for :class:`~streamline_bench.harness.lm.StreamlineLM`.
            With a recipe, ``seed`` is the recipe's.

    Raises:
        StreamlineBenchError: unknown arguments, an unusable recipe or model, or a model that vLLM
            cannot serve.
    """

    def __init__(self, pretrained: Any = None, **arguments: Any) -> None:
        if pretrained is not None and not isinstance(pretrained, str):
            raise CheckpointError(
                f"vLLM loads a model from a folder or the hub, and was given a "
                f"{type(pretrained).__name__}; save it first."
            )
        sorted_arguments = sort_arguments(
            {"pretrained": pretrained, **arguments}, parameters_of(VLLM), _ENGINE_ARGUMENTS
        )
        register()
        self._prepared = prepare(sorted_arguments)
        harness = {**sorted_arguments.harness, "pretrained": self._prepared.pretrained}
        if self._prepared.key is not None:
            harness["revision"] = None  # The revision was that of the source.
        self._revision = harness.get("revision")
        _refuse_networks_in_wrappers(self._prepared.pretrained)
        overrides = stored_overrides(self._prepared.pretrained)
        if overrides and "hf_overrides" not in harness:
            harness["hf_overrides"] = overrides
        super().__init__(**_with_cache_size(harness))
        name_other_templates(harness.get("tokenizer") or harness["pretrained"], self.tokenizer)

    @cached_property
    def _weights(self) -> str | None:
        return files_sha256(self._prepared.pretrained, revision=self._revision)

    def _model_generate(
        self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None
    ) -> list[Any]:
        outputs: list[Any] = super()._model_generate(requests, generate, sampling_params)
        for output in outputs if generate else ():
            new = output.outputs[0]
            new.text = self.tokenizer.decode(new.token_ids, skip_special_tokens=True)
            counted = count_answer(
                new.token_ids, ends=(), stop=(), think_end=self.think_end_token,
                decode=self.tokenizer.decode,
            )  # fmt: skip
            self._note_answer(counted._replace(unfinished=float(new.finish_reason == "length")))
        return outputs

    def get_model_info(self) -> dict[str, Any]:
        """Return what ``--model streamline`` reports: sizes, recipe and hashes."""
        folder = Path(self._prepared.pretrained)
        counted = self._weights is not None and folder.is_dir()
        return {
            "model_num_parameters": CheckpointReader(folder).num_parameters if counted else None,
            "model_dtype": self.model_args["dtype"],
            "model_revision": self._revision or "main",
            "streamline": {**self._prepared.info(), "weights_sha256": self._weights},
            **self._noted(),
        }

    def _identity(self) -> str:
        settings = {
            name: getattr(self, name)
            for name in (
                "add_bos_token",
                "max_length",
                "prefix_token_id",
                "think_end_token",
                "truncation_side",
            )
        }
        engine = {k: v for k, v in self.model_args.items() if v is not None and k not in _SIZES}
        weights = self._weights or f"{self._prepared.pretrained}@{self._revision}"
        return model_identity(weights, {"engine": "vllm", **engine, **settings})


def _refuse_networks_in_wrappers(pretrained: str) -> None:
    """Refuse a multimodal folder whose text model vLLM's class of the folder cannot build."""
    if not (Path(pretrained) / "config.json").is_file():
        return
    wrapper = CheckpointReader(pretrained).wrapper
    if wrapper is not None and wrapper.text_type == "streamline":
        raise CheckpointError(
            f"{pretrained} is a '{wrapper.model_type}' whose text model is of type 'streamline', "
            "which vLLM does not serve inside another model; use --model streamline."
        )


def _with_cache_size(harness: dict[str, Any]) -> dict[str, Any]:
    """Give the key-value cache a size on a CPU, where vLLM's share of all memory is too much."""
    named = any(harness.get(key) for key in ("kv_cache_memory_bytes", "gpu_memory_utilization"))
    if named or os.environ.get("VLLM_CPU_KVCACHE_SPACE") or not current_platform.is_cpu():
        return harness
    free = psutil.virtual_memory().available
    return {**harness, "kv_cache_memory_bytes": min(free // _CPU_CACHE_SHARE, _CPU_CACHE_MOST)}
