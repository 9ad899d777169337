"""vLLM in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Serve = Callable[[dict[str, dict[str, Any]], list[list[int]], int], dict[str, Any]]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Return a function: options of LLM by key, prompts, number of tokens -> answers by key.

    All engines run in one process (serve_models.py).
    """
    pytest.importorskip("vllm", reason="vLLM is not installed (tox -e vllm)")

    def run(
        models: dict[str, dict[str, Any]], prompts: list[list[int]], tokens: int
    ) -> dict[str, Any]:
        work = tmp_path_factory.mktemp("served")
        jobs, answers = work / "jobs.json", work / "answers.json"
        jobs.write_text(json.dumps({"prompts": prompts, "tokens": tokens, "models": models}))
        script = Path(__file__).with_name("serve_models.py")
        done = subprocess.run(
            [sys.executable, str(script), str(jobs), str(answers)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return dict(json.loads(answers.read_text()))

    return run
