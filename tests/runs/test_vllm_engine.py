"""``compare --engine vllm``: answers of vLLM, its noise, and what is above that."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from streamline_bench.demo import bundled_request
from streamline_bench.runs.planning.request import make_request
from streamline_bench.runs.run import compare_request
from streamline_bench.stability.readers.lm_eval_reader import read_lm_eval

TASKS = ["streamline_demo_agreement", "streamline_demo_recall"]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1200)  # three starts of the engine
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (tox -e vllm)")
def test_rows_and_their_noise_are_of_one_engine(tmp_path: Path) -> None:
    request = make_request(
        bundled_request(
            {
                "recipes": ["last_layers"],
                "set": {"n_layers": 3},
                "tasks": TASKS,
                "engine": "vllm",
                "batch_size": None,
                "model_args": {"enforce_eager": True, "max_model_len": 256},
                "limit": 6,
                "dtype": "float32",
                "device": "cpu",
                "environment": {
                    "HF_HUB_OFFLINE": "1",
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                    "TORCH_COMPILE_DISABLE": "1",
                },
            }
        )
    )
    result = compare_request(request, tmp_path / "run", progress=False)
    assert (result.exit_code, dict(result.failures), dict(result.reasons)) == (0, {}, {})
    for place in ("dense/eval", "last_layers/eval", "noise/batch-size-8/eval"):
        found = read_lm_eval(tmp_path / "run" / place, progress=False).info
        assert found.computed_by == dict.fromkeys(TASKS, "vLLM")
        assert found.config["model"] == "streamline-vllm"
    board = json.loads((tmp_path / "run" / "leaderboard.json").read_text(encoding="utf-8"))
    assert board["noise"]["repeats"] == ["vLLM again, batch size 8"]
    (row,) = [row for row in board["rows"] if row["label"] == "last_layers"]
    for task in row["tasks"]:
        compared = task["comparison"]
        flips = compared["flips"]["right_to_wrong"] + compared["flips"]["wrong_to_right"]
        above = compared["flips_above_noise"]["value"]
        assert above == pytest.approx(flips / 6 - compared["noise_flips"])
    assert (tmp_path / "run" / "leaderboard.html").is_file()
