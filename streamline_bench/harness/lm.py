"""``--model streamline``: the harness's transformers model, for compressed models, faster.

It takes what ``--model hf`` takes, and a recipe: the model is then compressed on first use and
found in the cache afterwards. Loglikelihoods are those of the stock class with less computed
(:mod:`streamline_bench.harness.scoring.scorer`); generation is untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from streamline_bench.core.architecture import RopeGroups, rope_groups
from streamline_bench.core.data.calibration import require_known_tokens
from streamline_bench.core.machine.environment import has_bfloat16_units, known_device
from streamline_bench.core.machine.ranks import launched
from streamline_bench.errors import (
    CheckpointError,
    RecipeError,
    StreamlineBenchError,
    library_errors,
)
from streamline_bench.harness.answer_tokens import count_answer
from streamline_bench.harness.arguments import parameters_of, sort_arguments
from streamline_bench.harness.model_creation import (
    CompressedModel,
    model_identity,
    user_errors,
    weights_sha256,
)
from streamline_bench.harness.preparation import prepare
from streamline_bench.harness.scoring.forward import Forward, forget_lengths
from streamline_bench.harness.scoring.packing import Query
from streamline_bench.harness.scoring.scorer import (
    Answer,
    TokenScorer,
    generation_batch,
    scorer_of,
    scoring_tokens,
)
from streamline_bench.modeling.loading import (
    CausalLM,
    load_config,
    multimodal_reader,
    name_other_templates,
    require_package,
)

logger = logging.getLogger(__name__)

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""(strings, context tokens, continuation tokens) as the harness makes them."""


class StreamlineLM(CompressedModel, HFLM):  # type: ignore[misc]
    """A causal language model from a folder or the hub, compressed by a recipe if one is given.

    Args:
        **arguments: those of ``lm_eval.models.huggingface.HFLM`` and of ``from_pretrained``, and
            ``recipe`` (a name or a YAML file), ``sparsity`` or ``n_layers``, ``replacement``,
            ``calibration``, ``seed`` and dotted keys of the recipe (``training.lr``), and
            ``cache`` (folder of compressed models).

    Raises:
        StreamlineBenchError: unknown arguments, an unusable recipe or model.
    """

    def __init__(self, pretrained: Any = None, **arguments: Any) -> None:
        from streamline_bench.modeling import register

        sorted_arguments = sort_arguments(
            {"pretrained": pretrained, **arguments}, parameters_of(HFLM)
        )
        register()
        self._prepared = prepare(sorted_arguments)
        if not (sorted_arguments.harness.get("gguf_file") or self._prepared.in_memory):
            require_package(self._prepared.pretrained)
        self._scorer: TokenScorer | None = None
        self._scorer_refused = False
        self._weights: str | None = None
        self._text_model = False
        harness = dict(sorted_arguments.harness)
        self._dtype_given = not {"dtype", "torch_dtype", "mixed_precision_dtype"}.isdisjoint(
            harness
        )
        if isinstance(pretrained, str):
            harness["pretrained"] = self._prepared.pretrained
        if self._prepared.key is not None:
            harness["revision"] = "main"  # The revision was that of the source.
        name = self._prepared.pretrained
        with library_errors(f"{name}: the model cannot be loaded", kind=CheckpointError):
            super().__init__(**harness)
        if isinstance(pretrained, str):
            _require_device(harness.get("device"), self._device)
        accelerator = getattr(self, "accelerator", None)
        processes: int = getattr(self, "_world_size", 1)
        if accelerator is not None and processes == 1:
            # The stock class shares requests among GPUs only; without that, all would answer all.
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        with library_errors(
            f"No tokenizer can be loaded from {tokenizer or pretrained}",
            "pass tokenizer=<folder or hub id>",
            CheckpointError,
        ):
            super()._create_tokenizer(pretrained, tokenizer, **options)
        name_other_templates(tokenizer or pretrained, self.tokenizer)

    def _get_config(self, pretrained: str, **options: Any) -> None:
        super()._get_config(pretrained, **options)
        if not options.get("gguf_file") and (reader := multimodal_reader(pretrained, options)):
            self._config = load_config(reader.folder)
            self._text_model = True

    def _get_backend(self, config: Any, backend: Any = "default", **options: Any) -> None:
        if self._text_model and backend == "default":
            backend, self.AUTO_MODEL_CLASS = "causal", CausalLM
        super()._get_backend(config, backend, **options)

    def _create_model(self, pretrained: str, *, dtype: Any = "auto", **options: Any) -> None:
        """Load the model; on a CPU in float32 where it is stored in bfloat16 and no dtype is given.

        Without units for bfloat16 a CPU computes in it several times slower than in float32.
        """
        config = self._config.get_text_config()
        stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        slow = self._device.type == "cpu" and str(stored).endswith("bfloat16")
        plain = getattr(self._config, "quantization_config", None) is None
        if slow and plain and not self._dtype_given and not has_bfloat16_units():
            logger.info(
                "The model is stored in bfloat16, and this CPU has no units for it: it is scored "
                "in float32 (dtype=auto or dtype=bfloat16 keeps it as it is)."
            )
            dtype = "float32"
        super()._create_model(pretrained, dtype=dtype, **options)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the stock class reports, and ``streamline``: recipe, hashes and sizes."""
        info = {**self._prepared.info(), "weights_sha256": self._weights_sha256()}
        return {**super().get_model_info(), "streamline": info, **self._noted()}

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of every text, as the stock class does.

        All windows of all texts are scored together, so that they are batched by length.
        """
        with user_errors():
            if self._token_scorer() is None:
                return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]
            windows, owners = self._rolling_windows(requests)
            answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
            totals = window_sums(answers, owners, len(requests))
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

    def _rolling_windows(self, requests: Any) -> tuple[list[TokenRequest], list[int]]:
        """Return the windows of all texts, and the number of the request each belongs to."""
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for context, continuation in self._windows(request.args[0]):
                windows.append((None, context, continuation))
                owners.append(number)
        return windows, owners

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in windows]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[TokenRequest],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        scorer = self._token_scorer()
        if scorer is None or not requests:
            return super()._loglikelihood_tokens(  # type: ignore[no-any-return]
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
        queries = self._queries(requests)

        def keep(index: int, answer: Answer) -> None:
            strings = requests[index][0]
            if strings is not None:  # Windows of rolling requests are kept as a whole, elsewhere.
                self.cache_hook.add_partial("loglikelihood", strings, answer)

        return scorer.score(
            queries,
            batch_tokens=self._batch_tokens(queries),
            on_answer=keep,
            progress=not disable_tqdm and self.rank == 0,
        )

    def _batch_tokens(self, queries: Sequence[Query]) -> int:
        longest = max(len(query.inputs) for query in queries)
        return scoring_tokens(self.batch_size, longest, self.device, self.max_batch_size or 64)

    def _queries(self, requests: Sequence[TokenRequest]) -> list[Query]:
        """Cut requests to the model's length, from the left, as the stock class does."""
        limit = self.max_length
        queries, cut = [], 0
        rows = self.model.config.get_text_config().vocab_size
        for index, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= limit:
                raise StreamlineBenchError(
                    f"Request {index} has {len(context)} context and {len(continuation)} "
                    f"continuation tokens; both are needed, and at most {limit} of the latter "
                    "(max_length)."
                )
            require_known_tokens(
                [*context, *continuation], self.tokenizer, rows, f"Request {index}"
            )
            cut += len(context) + len(continuation) > limit + 1
            inputs = (context + continuation)[-(limit + 1) :][:-1]
            queries.append(Query(index, inputs, continuation))
        if cut:
            logger.warning(
                "%d requests are longer than the model's %d tokens and were cut from the left.",
                cut,
                limit,
            )
        return queries

    def _token_scorer(self) -> TokenScorer | None:
        if self._scorer is None and not self._scorer_refused:
            self._scorer = self._make_scorer()
            self._scorer_refused = self._scorer is None
        return self._scorer

    def _make_scorer(self) -> TokenScorer | None:
        if self.backend != "causal":
            logger.info(
                "The model is not a decoder-only one: it is scored as --model hf scores it."
            )
            return None
        config = self.model.config.get_text_config()
        groups = rope_groups(config)
        scorer = scorer_of(
            Forward(lambda: self.model, self.device, self._call_context),
            config,
            "The model is scored as --model hf scores it",
            softmax_dtype=self.softmax_dtype or torch.float32,
            groups=groups,
        )
        _say_what_depends(groups, apart=scorer is not None)
        return scorer

    def _model_generate(self, *arguments: Any, **options: Any) -> Any:
        forget_lengths(self.model)
        found = super()._model_generate(*arguments, **options)
        context = options["context"] if "context" in options else arguments[0]
        begin = context.shape[1] if self.backend == "causal" else 0
        for tokens in found[:, begin:].tolist():
            self._note_answer(
                count_answer(
                    tokens, ends=self._ends, stop=options.get("stop") or (),
                    think_end=self.think_end_token, decode=self.tok_decode,
                )
            )  # fmt: skip
        return found

    @cached_property
    def _ends(self) -> set[int]:
        """Tokens that end a generated answer."""
        named = getattr(self.model, "generation_config", None)
        ends = getattr(named, "eos_token_id", None)
        found = {self.eot_token_id, *(ends if isinstance(ends, list) else [ends])}
        return {token for token in found if token is not None}

    def _call_context(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(
            torch.autocast(
                device_type=self.device.type,
                dtype=self.mixed_precision_dtype,
                enabled=self.mixed_precision_dtype is not None,
            )
        )
        return stack

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """Answer ``batch_size=auto`` for generation by arithmetic, without trial runs."""
        if self._token_scorer() is None:
            return super()._detect_batch_size(requests, pos)  # type: ignore[no-any-return]
        config = self.model.config.get_text_config()
        return generation_batch(
            config, self.model.dtype, self.max_length, self.max_batch_size or 64, self.device
        )

    def _weights_sha256(self) -> str:
        if self._weights is None:
            self._weights = weights_sha256(
                self._prepared.pretrained,
                self.model,
                revision=self.revision,
                patched=bool(self._prepared.in_memory or self.peft or self.delta),
            )
        return self._weights

    def _identity(self) -> str:
        settings = {
            name: getattr(self, name)
            for name in (
                "add_bos_token",
                "mixed_precision_dtype",
                "softmax_dtype",
                "truncation",
                "think_end_token",
                "max_length",
                "prefix_token_id",
            )
        }
        quantization = getattr(self.config, "quantization_config", None)
        return model_identity(
            self._weights_sha256(),
            {
                **settings,
                "dtype": self.model.dtype,
                "quantization": quantization,
                "tokenizer": self.tokenizer.name_or_path,
                "vocabulary": len(self.tokenizer),
            },
        )


def _say_what_depends(groups: RopeGroups, *, apart: bool) -> None:
    """Warn of numbers that depend on the batch.

    Args:
        apart: requests on both sides of the limit are scored apart.
    """
    if groups.limit is None:
        return
    before = " and on the requests before it" if groups.by_length else ""
    logger.warning(
        "Beyond %d tokens, the rotary frequencies of this model depend on the longest sequence of "
        "a batch. %s: use batch_size=1 there.",
        groups.limit,
        "Requests on both sides of that are scored apart here. Results of generated text depend on "
        f"the batch, and those of --model hf on the batch{before}"
        if apart
        else "Results depend on the batch",
    )


def _require_device(asked: Any, used: torch.device) -> None:
    """Refuse another device than was asked for: the stock class takes one without a word.

    Raises:
        RecipeError: naming both.
    """
    if asked in (None, "auto") or (asked == "cuda:0" and not torch.cuda.is_available()):
        return  # cuda:0 is what the harness says where its user says nothing
    wanted = torch.device(known_device(str(asked)))
    single = launched().count == 1  # else each process has one of its own
    other = single and None not in (wanted.index, used.index) and wanted.index != used.index
    if wanted.type != used.type or other:
        raise RecipeError(
            f"This machine has no device '{asked}', and the model is on {used}; give device={used}."
        )


def window_sums(answers: Sequence[Answer], owners: Sequence[int], count: int) -> list[float]:
    """Add up the log-probabilities of windows, by the number of the text they belong to."""
    totals = [0.0] * count
    for owner, (score, _) in zip(owners, answers, strict=True):
        totals[owner] += score
    return totals
