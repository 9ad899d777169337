"""What the OpenCompass classes ask of an engine (score texts, write answers), and vLLM as one.

PPL, as OpenCompass calls it, is the mean negative log-likelihood per token in nats, not its
exponential. Every token after the first is predicted, and the sum is divided by the number of
**all** tokens, the first one (usually BOS) included: n - 1 terms over n. With a mask of m tokens,
the tokens from number m on are scored and the sum is divided by n - m. Tokens equal to the padding
token count neither in the sum nor in the divisor, wherever they stand (OpenCompass 0.5.4,
``HuggingFaceBaseModel.get_ppl``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import StoppingCriteria

from streamline_bench.errors import StreamlineBenchError
from streamline_bench.modeling.loading import stored_overrides
from streamline_bench.modeling.vllm.package import require_vllm
from streamline_bench.opencompass.source import ModelSource


@dataclass(frozen=True)
class ScoredText:
    """A token sequence, the parts of it to score, and what to divide by.

    Attributes:
        ids: token ids of the whole text.
        spans: ``(start, end)`` of the tokens to score; ``1 <= start < end <= len(ids)``.
        divisor: number of tokens the mean is over.
    """

    ids: Sequence[int]
    spans: tuple[tuple[int, int], ...]
    divisor: int

    @classmethod
    def whole(
        cls, ids: Sequence[int], *, masked: int = 0, padding: int | None = None
    ) -> ScoredText:
        """All of a text but its first ``masked`` tokens (at least one), as OpenCompass scores it.

        Raises:
            StreamlineBenchError: no token is left to divide by.
        """
        counted = sum(token != padding for token in ids) - masked
        if counted < 1:
            raise StreamlineBenchError(
                f"A prompt of {len(ids)} tokens, {masked} of them masked, has no perplexity; check "
                "the prompt template (an empty prompt, or one that ends before the answer)."
            )
        return cls(ids, spans_between(ids, max(1, masked), len(ids), padding=padding), counted)


def spans_between(
    ids: Sequence[int], start: int, end: int, *, padding: int | None = None
) -> tuple[tuple[int, int], ...]:
    """Return the runs of tokens in ``[start, end)`` that are no padding tokens."""
    spans: list[tuple[int, int]] = []
    for at in range(start, end):
        if ids[at] == padding:
            continue
        if spans and spans[-1][1] == at:
            spans[-1] = (spans[-1][0], at + 1)
        else:
            spans.append((at, at + 1))
    return tuple(spans)


def continuation_start(text: str, continuation: str) -> int:
    """Return the character at which a continuation starts: it must end the text.

    Raises:
        StreamlineBenchError: it does not.
    """
    if not continuation or not text.endswith(continuation):
        shown = text if len(text) <= 80 else f"...{text[-77:]}"
        raise StreamlineBenchError(
            f"The continuation '{continuation}' is not the end of the prompt '{shown}'; the data "
            "set's column 'cont' must be what the prompt template ends with."
        )
    return len(text) - len(continuation)


class StopWords(StoppingCriteria):  # type: ignore[misc]
    """Stops each row by itself; the prompt is not looked at.

    Args:
        words: texts that end an answer.
        tokenizer: decodes the last tokens.
        prompt_length: tokens per row that belong to the prompt (padding included).
    """

    def __init__(self, words: Sequence[str], tokenizer: Any, prompt_length: int) -> None:
        self._words = list(words)
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        # A word that has just become complete lies within its last bytes' worth of tokens: a
        # token that shows anything shows at least one byte.
        self._look_back = max(len(word.encode()) for word in words) + 4

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **options: Any
    ) -> torch.BoolTensor:
        """Return ``[rows]`` bool: whether a row is complete."""
        new = input_ids[:, max(self._prompt_length, input_ids.shape[1] - self._look_back) :]
        texts = self._tokenizer.batch_decode(new)
        ended = [any(word in text for word in self._words) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


def cut_at(text: str, words: Sequence[str]) -> str:
    """Return the text before the first stop word in it."""
    ends = [at for at in (text.find(word) for word in words) if at >= 0]
    return text[: min(ends)] if ends else text


@dataclass(frozen=True)
class GenerationSettings:
    """How to continue prompts.

    Attributes:
        most: at most this many new tokens.
        least: at least this many, None for no such bound.
        stop_words: texts that end an answer; they are cut off.
        options: further settings of the engine (``temperature``, ``num_return_sequences``, …).
    """

    most: int
    least: int | None = None
    stop_words: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """Runs one model."""

    tokenizer: Any
    max_length: int
    """Tokens a text may have."""

    def logprob_sums(self, texts: Sequence[ScoredText]) -> list[float]:
        """Return the summed log-probability (nats) of the spans of every text."""
        ...

    def generate(self, prompts: Sequence[list[int]], settings: GenerationSettings) -> list[str]:
        """Return the answers, ``num_return_sequences`` for every prompt, in their order."""
        ...


_OF_VLLM = {"num_return_sequences": "n", "max_new_tokens": "max_tokens"}
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

        options = {_OF_VLLM.get(key, key): value for key, value in settings.options.items()}
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
