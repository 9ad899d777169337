"""Runs a model in vLLM: scores by prompt log-probabilities, generates as usual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamline_bench.modeling.loading import stored_overrides
from streamline_bench.modeling.vllm.package import require_vllm
from streamline_bench.opencompass.engine import GenerationSettings, ScoredText, cut_at
from streamline_bench.opencompass.source import ModelSource

RENAMED = {"num_return_sequences": "n", "max_new_tokens": "max_tokens"}
"""Keys of transformers' generation -> vLLM's sampling parameters."""


class VLLMEngine:
    """One model in vLLM.

    Args:
        source: checkpoint and options for ``vllm.LLM``.
        tokenizer: its tokenizer; vLLM gets token ids only.
        max_length: tokens that vLLM has room for; a text may have one less, because vLLM always
            generates at least one token.

    Raises:
        MissingDependencyError: vLLM is not installed.
    """

    def __init__(self, source: ModelSource, tokenizer: Any, max_length: int) -> None:
        require_vllm("StreamlineVLLM")
        from vllm import LLM

        self.tokenizer = tokenizer
        options = {"max_model_len": max_length, **source.options}
        self.max_length = int(options["max_model_len"]) - 1
        if overrides := stored_overrides(source.prepared.pretrained):
            options.setdefault("hf_overrides", overrides)
        if source.revision is not None:
            options["revision"] = source.revision
        self.model = LLM(
            model=source.prepared.pretrained,
            dtype=source.dtype,
            trust_remote_code=source.trust_remote_code,
            **options,
        )

    def logprob_sums(self, texts: Sequence[ScoredText]) -> list[float]:
        """Return the summed log-probability (nats) of the spans of every text."""
        from vllm import SamplingParams, TokensPrompt

        parameters = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False
        )
        prompts = [TokensPrompt(prompt_token_ids=list(text.ids)) for text in texts]
        outputs = self.model.generate(prompts, parameters, use_tqdm=False)
        return [_sum(text, out.prompt_logprobs) for text, out in zip(texts, outputs, strict=True)]

    def generate(self, prompts: Sequence[list[int]], settings: GenerationSettings) -> list[str]:
        """Return the answers, ``num_return_sequences`` for every prompt, in their order."""
        from vllm import SamplingParams, TokensPrompt

        options = {RENAMED.get(key, key): value for key, value in settings.options.items()}
        sampled = options.pop("do_sample", "temperature" in options)
        if not sampled:
            options["temperature"] = 0.0
        parameters = SamplingParams(
            max_tokens=settings.most,
            min_tokens=settings.least or 0,
            stop=list(settings.stop_words),
            **options,
        )
        tokens = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        outputs = self.model.generate(tokens, parameters, use_tqdm=False)
        answers = [list(answer.token_ids) for out in outputs for answer in out.outputs]
        # Decoded here: vLLM's own text may begin with a space that the tokenizer leaves out.
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [cut_at(text, settings.stop_words) for text in texts]


def _sum(text: ScoredText, logprobs: Sequence[Any]) -> float:
    total = 0.0
    for start, end in text.spans:
        for at in range(start, end):
            total += logprobs[at][text.ids[at]].logprob
    return total
