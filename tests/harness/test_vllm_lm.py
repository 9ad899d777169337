"""``--model streamline-vllm``: arguments, refusals, and the answers of ``--model streamline``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HAS_VLLM = find_spec("vllm") is not None
TASKS = "streamline_demo_agreement,streamline_demo_recall"


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    try:
        metadata.distribution("streamline-bench")
    except metadata.PackageNotFoundError:
        pytest.skip("streamline-bench is not installed in this environment (pip install -e .)")


def lm_eval(arguments: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the stock command."""
    options = [part for key, value in arguments.items() for part in (f"--{key}", value) if part]
    environment = {
        **os.environ,
        "HF_HOME": str(cwd / "hf"),
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # vLLM compiles two functions of its sampler even where the model runs eagerly.
        "TORCH_COMPILE_DISABLE": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *options],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


@pytest.mark.slow
@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed here")
def test_absent_vllm_is_one_sentence_with_the_line_to_install_it(
    tiny_llama: Path, tmp_path: Path
) -> None:
    done = lm_eval(
        {"model": "streamline-vllm", "model_args": f"pretrained={tiny_llama}", "tasks": "arc_easy"},
        tmp_path,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("streamline-bench: ")]
    assert "--model streamline-vllm needs vLLM" in line
    assert "pip install 'streamline-bench[vllm]'" in line


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed (tox -e vllm)")
class TestWithVLLM:
    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ({"sparisty": 0.5}, "did you mean 'sparsity'"),
            ({"max_num_seq": 4}, "did you mean 'max_num_seqs'"),
            ({"n_layers": 2}, "add recipe="),
            ({"pretrained": "/no/such/folder"}, "does not exist"),
            ({"pretrained": 3}, "from a folder or the hub"),
        ],
    )
    def test_mistakes_are_refused_before_an_engine_starts(
        self, given: dict[str, Any], sentence: str, tiny_llama: Path
    ) -> None:
        from streamline_bench.errors import StreamlineBenchError
        from streamline_bench.harness.vllm_lm import StreamlineVLLM

        with pytest.raises(StreamlineBenchError, match=sentence):
            StreamlineVLLM(**{"pretrained": str(tiny_llama), **given})
        arguments = {"pretrained": str(tiny_llama), **given}
        with pytest.raises(StreamlineBenchError, match=sentence):
            StreamlineVLLM.create_from_arg_obj(arguments)

    def test_a_recipes_seed_goes_to_the_recipe(self) -> None:
        from lm_eval.models.vllm_causallms import VLLM

        from streamline_bench.harness.arguments import parameters_of, sort_arguments

        given = {"pretrained": "x", "seed": 5, "enforce_eager": True}
        engine = ["enforce_eager"]
        own = parameters_of(VLLM)
        with_recipe = sort_arguments({**given, "recipe": "random_layers"}, own, engine)
        assert with_recipe.overrides == {"seed": 5}
        assert with_recipe.harness == {"pretrained": "x", "enforce_eager": True}
        without = sort_arguments(given, own, engine)
        assert without.harness == given

    @pytest.mark.slow
    def test_stock_command_gives_the_answers_of_model_streamline(
        self, repository: Path, tmp_path: Path
    ) -> None:
        demo = repository / "streamline_bench" / "demo" / "model"
        recipe = f"recipe=streamline_swiglu_res,sparsity=0.25,cache={tmp_path / 'cache'}"
        quick = "calibration_samples=8,training_samples=64,training.min_steps=4"
        both = f"pretrained={demo},dtype=float32,{recipe},{quick}"
        common = {
            "tasks": TASKS,
            "limit": "6",
            "include_path": str(repository / "tasks" / "lm_eval"),
            "device": "cpu",
            "batch_size": "8",
            "log_samples": "",
        }

        def run(model: str, model_args: str) -> subprocess.CompletedProcess[str]:
            output = {"output_path": str(tmp_path / model)}
            done = lm_eval({"model": model, "model_args": model_args, **common, **output}, tmp_path)
            assert done.returncode == 0, done.stderr[-4000:]
            return done

        run("streamline", both)
        said = run("streamline-vllm", f"{both},enforce_eager=True,max_model_len=256")
        assert "Reusing the result of recipe 'streamline_swiglu_res'" in said.stderr
        theirs, ours = (answers(tmp_path / name) for name in ("streamline", "streamline-vllm"))
        assert ours["text"] == theirs["text"]
        assert ours["greedy"] == theirs["greedy"]
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-3)
        stock, served = (facts(tmp_path / name) for name in ("streamline", "streamline-vllm"))
        assert served["streamline"] == stock["streamline"]
        assert served["model_num_parameters"] == stock["model_num_parameters"]
        assert served["answer_tokens"] == stock["answer_tokens"] != {}


def answers(folder: Path) -> dict[str, Any]:
    """Generated texts, scores and whether they are greedy; each by document."""
    found: dict[str, Any] = {"text": {}, "score": {}, "greedy": {}}
    for file in sorted(folder.rglob("samples_*.jsonl")):
        task = file.name.partition("_20")[0]
        for row in map(json.loads, file.read_text().splitlines()):
            for number, answer in enumerate(row["filtered_resps"]):
                key = f"{task} {row['doc_id']} {number}"
                if isinstance(answer, str):
                    found["text"][key] = answer
                else:
                    found["score"][key], found["greedy"][key] = float(answer[0]), str(answer[1])
    assert len(found["text"]) == 6
    assert len(found["score"]) == 12
    return found


def facts(folder: Path) -> dict[str, Any]:
    """The config that the harness recorded."""
    (file,) = folder.rglob("results_*.json")
    return dict(json.loads(file.read_text())["config"])
