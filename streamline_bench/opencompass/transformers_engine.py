"""Runs a transformers model: scores right-padded batches, generates from left-padded ones.

Scoring is that of the harness class (:mod:`streamline_bench.harness.scoring.scorer`): texts that
begin alike share that part, positions are selected before the LM head, the softmax is float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from streamline_bench.core.architecture import rope_groups
from streamline_bench.core.data.calibration import require_known_tokens
from streamline_bench.errors import CheckpointError, library_errors
from streamline_bench.harness.scoring.forward import (
    Forward,
    forget_lengths,
    queries_of,
    tensors_of,
)
from streamline_bench.harness.scoring.packing import Layout, Layouts, Query
from streamline_bench.harness.scoring.scorer import LOGITS_PER_BATCH, scorer_of, scoring_tokens
from streamline_bench.modeling.loading import CausalLM, require_package, require_weights
from streamline_bench.opencompass.engine import GenerationSettings, ScoredText, StopWords, cut_at
from streamline_bench.opencompass.source import ModelSource

logger = logging.getLogger(__name__)


def load_causal_model(source: ModelSource) -> Any:
    """Return the causal LM of a source, in evaluation mode, greedy unless told otherwise.

    Raises:
        CheckpointError: it cannot be loaded, or weights are missing for it.
    """
    from streamline_bench.modeling import register

    register()
    name = source.prepared.pretrained
    require_package(name)
    options = {"use_safetensors": True, **source.options}
    if source.revision is not None:
        options["revision"] = source.revision
    with library_errors(
        f"{name}: the model cannot be loaded", "check its files and options", CheckpointError
    ):
        model, report = CausalLM.from_pretrained(
            name,
            dtype=source.dtype if source.dtype == "auto" else getattr(torch, source.dtype),
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by name below
            **options,
        )
    require_weights(name, report)
    if "device_map" not in options:
        device = source.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with library_errors(f"{name}: the model cannot be moved to {device}", kind=CheckpointError):
            model = model.to(device)
    for setting in ("temperature", "top_p", "top_k"):
        setattr(model.generation_config, setting, None)  # Sampling is asked for per task.
    model.generation_config.do_sample = False
    return model.eval()


class TransformersEngine:
    """One loaded model.

    Args:
        model: a causal LM of transformers.
        tokenizer: its tokenizer, with a padding token.
        max_length: tokens a text may have.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._forward = Forward(lambda: self.model, model.device, torch.no_grad)
        self._config = model.config.get_text_config()
        self._scorer = scorer_of(
            self._forward,
            self._config,
            "Every text is scored by itself",
            groups=rope_groups(self._config),
        )

    def _require_known(self, prompts: Iterable[Sequence[int]]) -> None:
        rows = self.model.get_input_embeddings().weight.shape[0]
        for ids in prompts:
            require_known_tokens(ids, self.tokenizer, rows, "A prompt")

    def logprob_sums(self, texts: Sequence[ScoredText]) -> list[float]:
        """Return the summed log-probability (nats) of the spans of every text.

        Raises:
            CalibrationError: a text has a token for which the model has no embedding.
        """
        self._require_known(text.ids for text in texts)
        if self._scorer is None:
            return [plain_logprob(self._forward, text) for text in texts]
        owners: list[int] = []
        queries: list[Query] = []
        for number, text in enumerate(texts):
            for start, end in text.spans:
                queries.append(
                    Query(len(queries), list(text.ids[: end - 1]), list(text.ids[start:end]))
                )
                owners.append(number)
        sums = [0.0] * len(texts)
        if not queries:
            return sums
        answers = self._scorer.score(
            queries, batch_tokens=self._batch_tokens(queries), progress=False
        )
        for owner, (logprob, _) in zip(owners, answers, strict=True):
            sums[owner] += logprob
        return sums

    def _batch_tokens(self, queries: Sequence[Query]) -> int:
        longest = max(len(query.inputs) for query in queries)
        device = self.model.device
        size = "auto" if device.type == "cpu" else len(queries)
        return scoring_tokens(size, longest, device, len(queries))

    def last_logits(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """Return ``[prompts, 1, vocabulary]`` float32 logits behind the last token of each."""
        self._require_known(prompts)
        if self._scorer is None:
            rows = [self._forward.all_logits(torch.tensor([ids]))[0, -1] for ids in prompts]
            return torch.stack(rows).float().unsqueeze(1)
        queries = [Query(number, ids, [0]) for number, ids in enumerate(prompts)]
        # Nothing is shared: prompts of one batch only stand side by side.
        positions = max(1, LOGITS_PER_BATCH // self._config.vocab_size)
        layout = Layout(0, 0.0, positions, self._scorer.groups)
        found: dict[int, torch.Tensor] = {}
        for batch in Layouts(queries, batch_tokens=self._batch_tokens(queries)).batches(layout):
            tensors = tensors_of(batch)
            logits = self._forward.wanted_logits(tensors).float()
            order = [query.index for query in queries_of(batch)]
            for at, owner in zip(tensors.target_at.tolist(), tensors.owner.tolist(), strict=True):
                found[order[owner]] = logits[at]
        return torch.stack([found[number] for number in range(len(prompts))]).unsqueeze(1)

    def generate(self, prompts: Sequence[list[int]], settings: GenerationSettings) -> list[str]:
        """Return the answers, ``num_return_sequences`` for every prompt, in their order.

        Prompts whose rotary frequencies would change each other are not batched
        (:class:`.RopeGroups`). A batch is halved where memory runs out.
        """
        self._require_known(prompts)
        rope = rope_groups(self._config)
        batches: dict[int, list[int]] = {}
        for number, ids in enumerate(prompts):
            batches.setdefault(rope.growing(len(ids), settings.most), []).append(number)
        answers: dict[int, list[str]] = {}
        for members in batches.values():
            texts = self._halved([prompts[number] for number in members], settings)
            each = len(texts) // len(members)
            for at, number in enumerate(members):
                answers[number] = texts[at * each : (at + 1) * each]
        return [text for number in range(len(prompts)) for text in answers[number]]

    def _halved(self, prompts: Sequence[list[int]], settings: GenerationSettings) -> list[str]:
        try:
            return self._generate(prompts, settings)
        except RuntimeError as error:
            if len(prompts) < 2 or not should_reduce_batch_size(error):
                raise
        logger.info("Out of memory at %d prompts; going on with half of that.", len(prompts))
        middle = len(prompts) // 2
        return [
            *self._halved(prompts[:middle], settings),
            *self._halved(prompts[middle:], settings),
        ]

    def _generate(self, prompts: Sequence[list[int]], settings: GenerationSettings) -> list[str]:
        from transformers import StoppingCriteriaList

        ids, mask = self._left_padded(prompts)
        options = dict(settings.options)
        if settings.least is not None:
            options["min_new_tokens"] = settings.least
        if settings.stop_words:
            stop = StopWords(settings.stop_words, self.tokenizer, ids.shape[1])
            options["stopping_criteria"] = StoppingCriteriaList([stop])
        forget_lengths(self.model)
        with torch.no_grad():
            outputs = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=settings.most,
                pad_token_id=self.tokenizer.pad_token_id,
                **options,
            )
        texts = self.tokenizer.batch_decode(outputs[:, ids.shape[1] :], skip_special_tokens=True)
        return [cut_at(text, settings.stop_words) for text in texts]

    def _left_padded(self, prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(ids) for ids in prompts)
        padding = self.tokenizer.pad_token_id
        rows = [[padding] * (longest - len(ids)) + ids for ids in prompts]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        device = self.model.device
        return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def plain_logprob(forward: Forward, text: ScoredText) -> float:
    """Return the summed log-probability (nats) of a text's spans."""
    if not text.spans:
        return 0.0
    ids = torch.tensor([list(text.ids)])
    logprobs = forward.all_logits(ids)[0].float().log_softmax(-1).cpu()
    total = 0.0
    for start, end in text.spans:
        picked = logprobs[start - 1 : end - 1].gather(-1, ids[0, start:end, None])
        total += float(picked.double().sum())
    return total
