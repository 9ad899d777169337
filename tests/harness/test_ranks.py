"""Two processes of one launch answer what one does, and compress once where nothing is cached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.core.machine.processes import free_port

EVALUATIONS = """
import json, os, sys
from pathlib import Path

import accelerate, lm_eval, torch, transformers.models.llama.modeling_llama
from lm_eval.tasks import TaskManager

import streamline_bench.compression.pipeline as pipeline
import streamline_bench.harness.lm
from streamline_bench.harness import bridge

INTO = pipeline._compress_into

def evaluate(folder, tasks, arguments):
    def into(*given, **options):
        (folder / f"made-{os.getpid()}").touch()
        return INTO(*given, **options)
    pipeline._compress_into = into
    bridge.register()
    found = lm_eval.simple_evaluate(
        model="streamline", model_args={**arguments, "cache": str(folder / "cache")},
        tasks=["words_choice"], batch_size=4, device="cpu", bootstrap_iters=0, verbosity="ERROR",
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
    )
    if found is not None:
        samples, accuracy = found["samples"]["words_choice"], found["results"]["words_choice"]
        rows = sorted((row["doc_id"], row["filtered_resps"]) for row in samples)
        (folder / "samples.json").write_text(json.dumps([rows, accuracy["acc,none"]]))

def start(ranks, port, folder, *given):
    folder.mkdir(parents=True)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            code = 1
            try:
                log = open(folder / f"log-{rank}", "w")
                os.dup2(log.fileno(), 2)
                os.environ.update(
                    WORLD_SIZE=str(ranks), RANK=str(rank), LOCAL_RANK=str(rank),
                    LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                    ACCELERATE_USE_CPU="true",
                )
                evaluate(folder, *given)
                code = 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

torch.set_num_threads(1)
root, port, tasks, cases = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
codes = {}
for name, arguments in cases.items():
    for ranks in (1, 2):
        codes[f"{name}-{ranks}"] = start(ranks, port, root / f"{name}-{ranks}", tasks, arguments)
(root / "codes.json").write_text(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def evaluations(
    make_tiny_model: Callable[..., Path],
    words_choice: Callable[[Path, int], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folder with the answers of one and of two processes, dense and compressed."""
    root = tmp_path_factory.mktemp("evaluations")
    tasks = words_choice(root / "tasks", 9)
    (root / "text.txt").write_text(" ".join(f"w{(7 * i) % 96}" for i in range(700)))
    port = str(free_port())
    model: dict[str, Any] = {"pretrained": str(make_tiny_model("llama", num_hidden_layers=4))}
    recipe = {
        "recipe": "streamline", "n_layers": 2, "calibration": str(root / "text.txt"),
        "sequence_length": 16, "training.min_steps": 4, "training.batch_size": 4,
    }  # fmt: skip
    cases = json.dumps({"dense": model, "compressed": {**model, **recipe}})
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(root / "hf"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    command = [sys.executable, "-c", EVALUATIONS, str(root), port, str(tasks), cases]
    subprocess.run(command, env=environment, check=True, timeout=280)
    return root


@pytest.mark.parametrize("case", ["dense", "compressed"])
def test_two_processes_answer_what_one_does(evaluations: Path, case: str) -> None:
    codes = json.loads((evaluations / "codes.json").read_text())
    logs = "".join(log.read_text() for log in evaluations.glob(f"{case}-*/log-*"))
    assert (codes[f"{case}-1"], codes[f"{case}-2"]) == ([0], [0, 0]), logs
    one, two = (
        json.loads((evaluations / f"{case}-{ranks}" / "samples.json").read_text())
        for ranks in (1, 2)
    )
    assert [number for number, _ in two[0]] == list(range(9))
    for (_, plain), (_, shared) in zip(one[0], two[0], strict=True):
        assert [greedy for _, greedy in shared] == [greedy for _, greedy in plain]
        scores = [float(score) for score, _ in plain]
        assert [float(score) for score, _ in shared] == pytest.approx(scores, abs=1e-4)
    assert one[1] == two[1]


def test_one_of_two_processes_compresses(evaluations: Path) -> None:
    assert len(list((evaluations / "compressed-2").glob("made-*"))) == 1
