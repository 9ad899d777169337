"""Where our errors meet the harness: a sentence and exit code 2 from its command line."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from streamline_bench.core.machine.environment import printable
from streamline_bench.errors import StreamlineBenchError

__all__ = ["share_log", "user_errors"]

_COMMAND = "lm_eval._cli"


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn our errors into one sentence and exit code 2 under the ``lm_eval`` command.

    A program that uses the harness as a library gets the exception, as does anyone who sets
    ``STREAMLINE_BENCH_TRACEBACK``.
    """
    try:
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
