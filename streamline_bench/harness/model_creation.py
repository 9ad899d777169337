"""What our models of the harness have in common, and where our errors meet the harness."""

from __future__ import annotations

import logging
import os
import sys
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lm_eval.api.model import LM

from streamline_bench.core.machine.environment import printable
from streamline_bench.errors import StreamlineBenchError, library_errors
from streamline_bench.harness.identity import separate_cache

Made = TypeVar("Made", bound="CompressedModel")


class CompressedModel(LM):  # type: ignore[misc]
    """Goes in front of the harness's class: a user's mistake ends its command with a sentence."""

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
        """Accept a response cache, kept apart by model (see :mod:`.identity`)."""
        with user_errors():
            separate_cache(cache_hook.dbdict, self._identity())
        super().set_cache_hook(cache_hook)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return generated texts, as the stock class does."""
        with user_errors():
            return super().generate_until(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

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
        if os.environ.get("LOCAL_RANK", "0") == "0":
            text = printable(error)
            sys.stderr.write(f"streamline-bench: {text}\n")
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
