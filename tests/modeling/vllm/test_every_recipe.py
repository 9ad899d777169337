"""What every recipe of ``baselines/`` makes is served by vLLM, with the tokens of transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.methods import list_recipes

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(3600)]

PROMPTS = [[1, 7, 23, 42], [1, *range(30, 50)]]
TOKENS = 8


@pytest.fixture(scope="module")
def served(
    recipe_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Recipe -> answer of vLLM; all engines run in one process."""
    pytest.importorskip("vllm", reason="vLLM is not installed (tox -e vllm)")
    models = {
        name: {"model": str(recipe_checkpoint(name)), "skip_tokenizer_init": True}
        for name in list_recipes()
    }
    work = tmp_path_factory.mktemp("served")
    jobs, answers = work / "jobs.json", work / "answers.json"
    jobs.write_text(json.dumps({"prompts": PROMPTS, "tokens": TOKENS, "models": models}))
    script = Path(__file__).with_name("serve_models.py")
    done = subprocess.run(
        [sys.executable, str(script), str(jobs), str(answers)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return dict(json.loads(answers.read_text()))


@pytest.mark.parametrize("name", list(list_recipes()))
def test_greedy_tokens_are_those_of_transformers(
    name: str, served: dict[str, Any], recipe_checkpoint: Callable[[str], Path]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from streamline_bench.modeling import register

    register()
    folder = recipe_checkpoint(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    assert "error" not in served[name], served[name]["error"]
    for prompt, answer in zip(PROMPTS, served[name]["tokens"], strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        written = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0
        )
        assert answer == written[0, len(prompt) :].tolist()
