"""The model class that OpenCompass configs name; variants use a chat template, or run it in vLLM.

It differs from OpenCompass's own in that batches are padded on the right and masked when scored
(its ``HuggingFaceBaseModel`` pads on the left and scores the token after the padding, so results
depend on the batch size), that unknown keys are errors, and that a recipe compresses the model on
first use. PPL is OpenCompass's: :mod:`streamline_bench.opencompass.engine`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from opencompass.models.base import BaseModel
from opencompass.models.base_api import APITemplateParser

from streamline_bench.errors import StreamlineBenchError
from streamline_bench.opencompass.engine import (
    Engine,
    GenerationSettings,
    ScoredText,
    VLLMEngine,
    continuation_start,
    spans_between,
)
from streamline_bench.opencompass.prompts import (
    PromptEncoder,
    chat_text,
    load_prompt_tokenizer,
    plain_text,
)
from streamline_bench.opencompass.source import entry_source, generation_pad, longest_input

Prompt = str | Sequence[Mapping[str, Any]]
Floats = npt.NDArray[np.float64]

_CHAT_ROLES = {
    "round": [
        {"role": "HUMAN", "api_role": "HUMAN"},
        # Few templates take a system message among the examples; OpenCompass maps it so too.
        {"role": "SYSTEM", "api_role": "HUMAN"},
        {"role": "BOT", "api_role": "BOT", "generate": True},
    ]
}


class StreamlineModel(BaseModel):  # type: ignore[misc]
    """A base model from a folder or the hub, compressed by a recipe if one is given.

    Args:
        path: folder (a compressed checkpoint as well) or hub id.
        max_seq_len: tokens of a prompt; longer ones are cut from the left. The model's own limit
            unless given.
        tokenizer_path: instead of the model's own tokenizer.
        tokenizer_kwargs: for ``AutoTokenizer.from_pretrained``.
        tokenizer_only: load no weights.
        meta_template: as OpenCompass defines it.
        generation_kwargs: for every generation (``do_sample``, ``temperature``, …).
        pad_token_id: instead of the tokenizer's own.
        stop_words: end every answer, in addition to the data set's.
        model_kwargs: for ``from_pretrained`` (``device_map``, ``dtype``, …).
        overrides: dotted keys of the recipe (``{"training.lr": 1e-3}``).
        **options: ``recipe``, ``sparsity`` or ``n_layers``, ``replacement``, ``calibration``,
            ``recovery``, ``seed``, ``cache``, ``device``, ``dtype``, ``revision``,
            ``trust_remote_code``, and what ``model_kwargs`` takes.

    Raises:
        StreamlineBenchError: unknown keys, an unusable recipe or model.
    """

    batch_padding = True
    for_vllm = False

    def __init__(
        self,
        path: str,
        *,
        max_seq_len: int | None = None,
        tokenizer_path: str | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        tokenizer_only: bool = False,
        meta_template: Mapping[str, Any] | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        pad_token_id: int | None = None,
        stop_words: Sequence[str] = (),
        model_kwargs: Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            path=path,
            max_seq_len=max_seq_len,
            tokenizer_only=tokenizer_only,
            meta_template=meta_template,
            generation_kwargs=dict(generation_kwargs or {}),
        )
        self.source = entry_source(
            path,
            model_kwargs=model_kwargs,
            overrides=overrides,
            for_vllm=self.for_vllm,
            **options,
        )
        name = str(tokenizer_path or self.source.prepared.pretrained)
        self.tokenizer = load_prompt_tokenizer(
            name,
            pad_token_id=pad_token_id,
            generation_pad=generation_pad(self.source),
            trust_remote_code=self.source.trust_remote_code,
            **dict(tokenizer_kwargs or {}),
        )
        self.max_seq_len = max_seq_len or longest_input(self.source)
        self.stop_words = tuple(stop_words)
        self._encoder = PromptEncoder(self.tokenizer)
        self._engine: Engine | None = None
        if not tokenizer_only:
            self._engine = self._make_engine()
            self.model = getattr(self._engine, "model", None)

    def _make_engine(self) -> Engine:
        from streamline_bench.opencompass.transformers_engine import (
            TransformersEngine,
            load_causal_model,
        )

        return TransformersEngine(load_causal_model(self.source), self.tokenizer, self.max_seq_len)

    @property
    def engine(self) -> Engine:
        """What runs the model.

        Raises:
            StreamlineBenchError: the model was made with ``tokenizer_only``.
        """
        if self._engine is None:
            raise StreamlineBenchError(
                f"{self.path} was loaded with tokenizer_only=True; leave that out to run it."
            )
        return self._engine

    def get_ppl(self, inputs: Sequence[Prompt], mask_length: list[int] | None = None) -> Floats:
        """Return the PPL of every prompt, ``[prompts]``.

        Args:
            mask_length: tokens at the beginning of each prompt that are not scored.
        """
        rows, lost = self._encode([self._score_text(each) for each in inputs], self.max_seq_len)
        masks = [0] * len(rows) if mask_length is None else mask_length
        texts = [
            # What was cut off was masked first.
            ScoredText.whole(
                ids, masked=max(0, int(mask) - cut), padding=self.tokenizer.pad_token_id
            )
            for ids, cut, mask in zip(rows, lost, masks, strict=True)
        ]
        sums = self.engine.logprob_sums(texts)
        return np.array([-total / text.divisor for text, total in zip(texts, sums, strict=True)])

    def get_loglikelihood(self, inputs: Sequence[Prompt], conts: Sequence[str]) -> Floats:
        """Return the summed log-probability of each prompt's end, ``[prompts]``.

        The continuation's tokens are those of the prompt beyond as many as its beginning has when
        encoded alone (OpenCompass's ``HuggingFaceCausalLM`` and lm-eval do the same).
        """
        texts = [self._score_text(prompt) for prompt in inputs]
        starts = [continuation_start(text, cont) for text, cont in zip(texts, conts, strict=True)]
        rows, lost = self._encode(texts, self.max_seq_len)
        contexts, _ = self._encode(
            [text[:start] for text, start in zip(texts, starts, strict=True)], 2**31
        )
        scored = []
        for ids, cut, context in zip(rows, lost, contexts, strict=True):
            start = min(max(1, len(context) - cut), len(ids))
            scored.append(ScoredText(ids, spans_between(ids, start, len(ids)), len(ids)))
        return np.array(self.engine.logprob_sums(scored))

    def get_ppl_tokenwise(
        self,
        inputs: Sequence[Prompt],
        label: Sequence[Sequence[Sequence[int]]],
        mask_length: list[int] | None = None,
    ) -> tuple[list[float], list[int]]:
        """Return, per prompt, the summed loss of the tokens in marked places, and their number.

        Args:
            label: per prompt, marked places as ``(first character, end, ...)``; a token that
                shows any marked character counts.
            mask_length: tokens at the beginning of each prompt that are not scored.
        """
        texts = [self._score_text(prompt) for prompt in inputs]
        masks = [0] * len(texts) if mask_length is None else mask_length
        scored = []
        for text, places, mask in zip(texts, label, masks, strict=True):
            ids, marked = self._marked_tokens(text, places)
            spans = tuple((at, at + 1) for at in marked if at >= max(1, mask))
            scored.append(ScoredText(ids, spans, max(1, len(spans))))
        sums = self.engine.logprob_sums(scored)
        return [-total for total in sums], [len(text.spans) for text in scored]

    def _marked_tokens(
        self, text: str, places: Sequence[Sequence[int]]
    ) -> tuple[list[int], list[int]]:
        encoded = self.tokenizer(
            text,
            add_special_tokens=self._adds_special,
            return_offsets_mapping=True,
            truncation=True,
            max_length=self.max_seq_len,
        )
        marked = [
            at
            for at, (start, end) in enumerate(encoded["offset_mapping"])
            if any(start < int(place[1]) and end > int(place[0]) for place in places)
        ]
        return list(map(int, encoded["input_ids"])), marked

    def get_logits(self, inputs: Sequence[Prompt]) -> tuple[Any, dict[str, Any]]:
        """Return ``[prompts, 1, vocabulary]`` logits behind each prompt, for ``CLPInferencer``.

        The inferencer reads the last position only, as the tokenizer pads on the left.
        """
        texts = [self._generation_text(prompt) for prompt in inputs]
        rows, _ = self._encode(texts, self.max_seq_len)
        last_logits = getattr(self.engine, "last_logits", None)
        if last_logits is None:
            raise StreamlineBenchError(
                f"{type(self).__name__} gives no logits, which CLPInferencer needs; use "
                "StreamlineModel for this data set."
            )
        return last_logits(rows), {"tokens": {"input_ids": rows}}

    def generate(
        self,
        inputs: Sequence[Prompt],
        max_out_len: int | None = None,
        min_out_len: int | None = None,
        stopping_criteria: Sequence[str] = (),
        **kwargs: Any,
    ) -> list[str]:
        """Return the model's answers.

        Args:
            max_out_len: most new tokens; ``max_new_tokens`` of ``generation_kwargs`` unless given.
            min_out_len: fewest new tokens.
            stopping_criteria: texts that end an answer; they are cut off.
            **kwargs: laid over ``generation_kwargs``.
        """
        options = {**self.generation_kwargs, **kwargs}
        most = options.pop("max_new_tokens", None) if max_out_len is None else max_out_len
        options.pop("max_new_tokens", None)
        if most is None:
            raise StreamlineBenchError(
                "The length of answers is not bounded; set max_out_len in the model's entry."
            )
        texts = [self._generation_text(prompt) for prompt in inputs]
        rows, _ = self._encode(texts, self.max_seq_len - int(most))
        words = tuple(dict.fromkeys([*stopping_criteria, *self.stop_words]))
        settings = GenerationSettings(int(most), min_out_len, tuple(w for w in words if w), options)
        return self.engine.generate(rows, settings)

    def encode(self, prompt: str) -> Any:
        """Return ``[1, tokens]`` token ids of a prompt."""
        import torch

        return torch.tensor([self.tokenizer(prompt)["input_ids"]])

    def decode(self, tokens: Any) -> str:
        """Return the text of ``[1, tokens]`` token ids."""
        return str(self.tokenizer.decode(tokens[0], skip_special_tokens=True))

    def get_token_len(self, prompt: Prompt, add_special_tokens: bool = True) -> int:
        """Return the number of tokens of a prompt."""
        special = add_special_tokens and self._adds_special
        text = self._score_text(prompt)
        return len(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    _adds_special = True

    def _score_text(self, prompt: Prompt) -> str:
        return plain_text(prompt)

    def _generation_text(self, prompt: Prompt) -> str:
        return plain_text(prompt)

    def _encode(self, texts: Sequence[str], limit: int) -> tuple[list[list[int]], list[int]]:
        return self._encoder.encode(texts, limit=limit, special=self._adds_special)


class StreamlineChatModel(StreamlineModel):
    """A chat model: as :class:`StreamlineModel`, with the tokenizer's chat template.

    Scored prompts (PPL) go through the template as well, as finished conversations.
    """

    _adds_special = False

    def __init__(self, path: str, *, meta_template: Any = None, **arguments: Any) -> None:
        super().__init__(path, **arguments)
        self.template_parser = APITemplateParser(meta_template or _CHAT_ROLES)

    def _score_text(self, prompt: Prompt) -> str:
        return chat_text(self.tokenizer, prompt, answer_follows=False)

    def _generation_text(self, prompt: Prompt) -> str:
        return chat_text(self.tokenizer, prompt, answer_follows=True)


class StreamlineVLLM(StreamlineModel):
    """A base model run by vLLM; scores and keys are those of :class:`StreamlineModel`.

    ``model_kwargs`` go to ``vllm.LLM`` as they are; a prompt may have one token less than the model
    reads, because vLLM always generates one. (OpenCompass's own class for vLLM
    divides by n - 1 where the others divide by n; this one does as the others.)

    Raises:
        MissingDependencyError: vLLM is not installed.
    """

    for_vllm = True

    def _make_engine(self) -> Engine:
        engine = VLLMEngine(self.source, self.tokenizer, self.max_seq_len)
        self.max_seq_len = engine.max_length
        return engine


class StreamlineVLLMChat(StreamlineChatModel, StreamlineVLLM):
    """A chat model run by vLLM: as :class:`StreamlineVLLM`, with the chat template."""
