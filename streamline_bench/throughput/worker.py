"""The process of one model: ``python -m streamline_bench.throughput.worker JOB``.

JOB is ``module:Class``. Requests arrive on stdin and replies leave on the original stdout, one JSON
object a line. Prints of libraries land on stderr. The process and all its children end when stdin
closes or its parent ends.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from typing import Any, BinaryIO

from streamline_bench.core.machine.processes import hold_leash
from streamline_bench.errors import StreamlineBenchError

_SIGNS = re.compile(
    r"out of memory|outofmemory|can't allocate memory|cannot allocate memory|MemoryError"
    r"|std::bad_alloc|no available memory for the cache blocks"
    r"|available memory on node .* is less than requested"
    r"|larger than the available KV cache memory|less than desired GPU memory utilization",
    re.IGNORECASE,
)


def main(arguments: list[str]) -> None:
    """Serve requests until stdin closes."""
    (job_path,) = arguments
    hold_leash()
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    module, _, attribute = job_path.partition(":")
    job: Any = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            if job is None:
                job = getattr(importlib.import_module(module), attribute)()
            answer = getattr(job, request["call"])(**request["arguments"])
        except Exception as error:  # whatever an engine raises is this model's failure
            _reply(replies, {"error": _sentence(error), "out_of_memory": _ran_out(error)})
            raise
        _reply(replies, {"answer": answer})


def is_out_of_memory(text: str) -> bool:
    """Whether the text of an error says that memory ran out (torch, CUDA, C++, vLLM)."""
    return _SIGNS.search(text) is not None


def _reply(replies: BinaryIO, payload: dict[str, Any]) -> None:
    replies.write(json.dumps(payload).encode() + b"\n")


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())[:500]
    if isinstance(error, StreamlineBenchError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _ran_out(error: BaseException | None) -> bool:
    while error is not None:
        if is_out_of_memory(f"{type(error).__name__}: {error}"):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
