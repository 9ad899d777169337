"""What our models of the harness have in common: errors, log, and one name per set of answers.

The harness keys its response cache (``--use_cache``) by the request alone. A pruned model that is
given the file of its dense parent would repeat the parent's answers. The cache is a table of key
and value that lets its owner encode keys; each model encodes them with its own name in front.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from lm_eval.api.model import LM

from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.machine.environment import printable
from streamline_bench.core.machine.ranks import say_once
from streamline_bench.core.recipe.validation import suggest_or_list
from streamline_bench.errors import (
    CacheError,
    CheckpointError,
    EvaluationError,
    StreamlineBenchError,
    library_errors,
)
from streamline_bench.harness.answer_tokens import AnswerCounter, of_all_processes
from streamline_bench.harness.preparation import PreparedModel
from streamline_bench.methods.tools.task_questions import (
    SEARCHED_FILE,
    doc_hash,
    searched_documents,
)
from streamline_bench.stability.readers.answer_tokens import ANSWER_TOKENS, AnswerTokens

Made = TypeVar("Made", bound="CompressedModel")


class CompressedModel(LM):  # type: ignore[misc]
    """Goes in front of the harness's class: a user's mistake ends its command with a sentence."""

    cache_hook: Any
    _prepared: PreparedModel
    answer_tokens: Mapping[str, Sequence[AnswerTokens]] = {}
    """Request -> tokens of its answers, of the requests that were generated last."""

    _named_template: str | None = None

    @classmethod
    def create_from_arg_string(
        cls: type[Made], arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Made:
        """Create the model from ``key=value,...``; see the class."""
        share_log()
        with user_errors():
            return super().create_from_arg_string(arg_string, additional_config)  # type: ignore[no-any-return]

    @classmethod
    def create_from_arg_obj(
        cls: type[Made], arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Made:
        """Create the model from a mapping; see the class."""
        share_log()
        with user_errors():
            return super().create_from_arg_obj(arg_dict, additional_config)  # type: ignore[no-any-return]

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Accept a response cache, kept apart by model (see :func:`separate_cache`)."""
        with user_errors():
            separate_cache(cache_hook.dbdict, self._identity())
        super().set_cache_hook(cache_hook)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the chat template, and use it where it is named.

        The stock class looks a name up for its records only: prompts are written by the default.

        Raises:
            CheckpointError: the tokenizer has no template of this name.
        """
        if not isinstance(chat_template, str):
            return super().chat_template(chat_template)  # type: ignore[no-any-return]
        with user_errors():
            known = getattr(self.tokenizer, "chat_template", None)
            named = known if isinstance(known, dict) else {}
            if chat_template not in named and known != self._named_template:
                raise CheckpointError(
                    f"{self.tokenizer.name_or_path} has no chat template '{chat_template}'"
                    f"{suggest_or_list(chat_template, named)}"
                )
        if chat_template in named:
            self._named_template = str(named[chat_template])
            self.tokenizer.chat_template = self._named_template
            if hasattr(self, "hf_chat_template"):  # what vLLM's class writes prompts by
                self.hf_chat_template = self._named_template
        return self._named_template

    def refuse_searched(self, requests: Any) -> None:
        """Refuse documents by which the model's layers were chosen.

        Raises:
            EvaluationError: naming the task.
        """
        searched = searched_documents(Path(self._prepared.pretrained))
        for request in requests if searched else ():
            if doc_hash(request.doc) in searched:
                raise EvaluationError(
                    f"Document {request.doc_id} of task '{request.task_name}' is one of those by "
                    f"which the layers of {self._prepared.pretrained} were chosen "
                    f"({SEARCHED_FILE}); score a split that was not searched."
                )

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Any]:
        """Return (log-probability, is greedy) of every continuation, as the stock class does."""
        with user_errors():
            self.refuse_searched(requests)
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return generated texts, as the stock class does; their tokens are counted."""
        counter = AnswerCounter(self.cache_hook)
        self.cache_hook = counter
        try:
            with user_errors():
                self.refuse_searched(requests)
                found: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        finally:
            self.cache_hook = counter.hook
        noted = counter.of_requests(requests, found)
        self.answer_tokens = of_all_processes(noted, self.world_size)
        return found

    def _note_answer(self, answer: AnswerTokens) -> None:
        """Keep the tokens of an answer that was generated, in the order of generation."""
        if isinstance(self.cache_hook, AnswerCounter):
            self.cache_hook.waiting.append(answer)

    def _noted(self) -> dict[str, Any]:
        """What the results' configuration says of the answers."""
        return {ANSWER_TOKENS: dict(self.answer_tokens)} if self.answer_tokens else {}

    @abstractmethod
    def _identity(self) -> str:
        """Name of what decides the answers, for caches."""


_COMMAND = "lm_eval._cli"


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn our errors into one sentence and exit code 2 under the ``lm_eval`` command.

    A program that uses the harness as a library gets the exception, as does anyone who sets
    ``STREAMLINE_BENCH_TRACEBACK``.
    """
    try:
        with library_errors():
            yield
    except StreamlineBenchError as error:
        if os.environ.get("STREAMLINE_BENCH_TRACEBACK") or not _under_command():
            raise
        sentence = f"streamline-bench: {printable(error)}\n"
        say_once(lambda: sys.stderr.write(sentence))
        raise SystemExit(2) from None


def share_log() -> None:
    """Let our log go where the harness's goes, if nobody has said otherwise.

    The harness shows its own logger only; what we compress or reuse would go unsaid.
    """
    theirs, ours = logging.getLogger("lm_eval"), logging.getLogger("streamline_bench")
    if theirs.handlers and not ours.hasHandlers():
        ours.setLevel(theirs.level)
        for handler in theirs.handlers:
            ours.addHandler(handler)


def _under_command() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(_COMMAND):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def weights_sha256(
    pretrained: str, model: Any, *, revision: str | None = None, patched: bool = False
) -> str:
    """Return a SHA-256 (hex) of the weights and the config that answer.

    Args:
        pretrained: what was loaded; the hash of its files is known or cheap.
        model: what answers; hashed itself where there are no safetensors files of it.
        revision: of a hub model.
        patched: adapters or deltas were added after loading.
    """
    of_files = None if patched else files_sha256(pretrained, revision=revision)
    if of_files is not None:
        return of_files
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    digest = hashlib.sha256(config.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def files_sha256(pretrained: str, *, revision: str | None = None) -> str | None:
    """Return the SHA-256 (hex) of a model's files, None if there are no safetensors files here."""
    folder = Path(pretrained)
    if not folder.is_dir():
        try:
            config = try_to_load_from_cache(pretrained, "config.json", revision=revision)
        except HFValidationError:
            return None
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
    if next(folder.glob("*.safetensors"), None) is None:
        return None
    return CheckpointReader(folder).fingerprint()


def model_identity(weights: str, settings: Mapping[str, Any]) -> str:
    """Name a model together with every setting that changes its answers (SHA-256 hex)."""
    payload = json.dumps({"weights": weights, **settings}, sort_keys=True, default=str)
    return hashlib.sha256(payload.encode()).hexdigest()


def separate_cache(cache: Any, identity: str) -> None:
    """Make a response cache (a ``SqliteDict``) read and write under this identity only.

    Raises:
        CacheError: the harness keeps its cache in another way than the one known here.
    """
    if cache is None:
        return
    if not hasattr(cache, "encode_key"):
        raise CacheError(
            f"This version of lm-eval caches responses in a {type(cache).__name__}, which cannot "
            "be kept apart by model; run without --use_cache."
        )
    prefix = f"{identity}:"
    cache.encode_key = lambda key: prefix + key
    cache.decode_key = lambda key: key.removeprefix(prefix)
