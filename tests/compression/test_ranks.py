"""``compress`` under torchrun's own agent, whose processes are forks that call the command."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from streamline_bench.cli.main import cli
from streamline_bench.core.checkpoint.folder import read_manifest, verify_files

LAUNCHES = """
import json, os, signal, sys
from pathlib import Path

import accelerate, peft, torch, torch._dynamo, transformers.models.llama.modeling_llama
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import streamline_bench.compression.pipeline, streamline_bench.methods.recovery.recover
from streamline_bench.cli.main import main
from streamline_bench.core.training import loop
from streamline_bench.methods.tools import shared_scan

STEP, LOSS, SCAN = loop.Loop._step, loop.Loop._loss, shared_scan.scan

def work(folder, arguments, victim, at, fault):
    rank = int(os.environ["RANK"])
    log = open(folder / "log", "a")
    os.dup2(log.fileno(), 2)
    def scan(*given, **options):
        (folder / f"scan-{rank}-{os.getpid()}").touch()
        return SCAN(*given, **options)
    def step(self, *given):
        if rank == victim and self.state.step == at and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return STEP(self, *given)
    def loss(self, *given):
        faulty = (rank, self.state.step, fault) == (victim, at, "nan")
        return LOSS(self, *given) * (float("nan") if faulty else 1.0)
    loop.Loop._step, loop.Loop._loss, shared_scan.scan = step, loss, scan
    main(arguments)

def launch(folder, count, arguments, victim=-1, at=-1, fault="", **variables):
    folder.mkdir(exist_ok=True)
    agent = os.fork()
    if agent:
        return os.waitstatus_to_exitcode(os.waitpid(agent, 0)[1])
    code = 3
    try:
        os.environ.update(ACCELERATE_USE_CPU="true", STREAMLINE_BENCH_CACHE=str(folder / "cache"))
        os.environ.update(variables)
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=folder.name, start_method="fork",
            rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", max_restarts=0, monitor_interval=0.1,
        )
        elastic_launch(config, work)(folder, arguments, victim, at, fault)
        code = 0
    except ChildFailedError as error:
        failures = {rank: failure.exitcode for rank, failure in error.failures.items()}
        (folder / "failures.json").write_text(json.dumps(failures))
        code = 4
    finally:
        os._exit(code)

torch.set_num_threads(1)
jobs, codes = json.loads(sys.argv[1]), []
for folder, variables, *job in jobs:
    codes.append(launch(Path(folder), *job, **variables))
print(json.dumps(codes))
"""

TRAINED = ["--n-layers", "2", "--set", "training.min_steps=12", "--set", "training.batch_size=3"]
TRAINED += ["--set", "training.checkpoint_every=2", "--set", "sequence_length=16"]
RECOVERED = ["--recipe", "last_layers_partial", "--n-layers", "1"]
RECOVERED += ["--set", "recovery.training.batch_size=3", "--set", "recovery.training.min_steps=8"]
RECOVERED += ["--set", "recovery.training.data.sequence_length=16", "--calibration", "self"]
RECOVERED += ["--set", "recovery.training.data.samples=40"]
DISTILLED = ["--recipe", "streamline_lm", *TRAINED, "--set", "training.objective=kd"]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SIZES: dict[str, list[str]] = {
    "none": ["--recipe", "streamline_none", "--n-layers", "2", "--set", "sequence_length=16"],
    "trained": ["--recipe", "streamline", *TRAINED],
    "recovered": RECOVERED,
    "distilled": DISTILLED,
    "streamed": [*DISTILLED, "--placement", "streamed"],
}


@pytest.fixture(scope="module")
def launched(
    make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int]]:
    """Folder of all launches, and the exit codes of their agents, in the order below."""
    root = tmp_path_factory.mktemp("launches")
    text = root / "text.txt"
    text.write_text(" ".join(f"w{(7 * i) % 96}" for i in range(700)))
    source = str(make_tiny_model("llama", num_hidden_layers=4))

    def job(name: str, recipe: str, count: int, *fault: Any, **variables: str) -> list[Any]:
        settings = ["--calibration", str(text), "--device", "cpu"]
        output = ["-o", str(root / name / "out")]
        arguments = ["compress", source, *settings, *SIZES[recipe], *output]
        return [str(root / name), variables, count, arguments, *fault]

    jobs = [
        job("none", "none", 2),
        job("none", "none", 2),  # refused: the output is there
        job("trained", "trained", 2),
        job("killed", "trained", 2, 1, 5, "kill"),
        job("killed", "trained", 2, 0, 9, "kill"),
        job("killed", "trained", 2),
        job("nan", "trained", 2, 1, 3, "nan"),
        job("recovered", "recovered", 2),
        job("divided", "streamed", 2, **FSDP),
    ]
    for name, recipe in (("alone", "recovered"), ("whole", "distilled")):
        alone = CliRunner().invoke(cli, job(name, recipe, 1)[3])
        assert alone.exit_code == 0, alone.output
    command = [sys.executable, "-c", LAUNCHES, json.dumps(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, env=environment, check=True, timeout=280, stdout=subprocess.PIPE, text=True
    )
    return root, json.loads(done.stdout.splitlines()[-1])


def _weights(folder: Path) -> str:
    manifest = read_manifest(folder)
    assert manifest is not None
    verify_files(folder, manifest)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def _said(folder: Path) -> list[str]:
    lines = (folder / "log").read_text().splitlines()
    return [line for line in lines if line.startswith("streamline-bench:")]


def test_a_recipe_without_training_is_carried_out_once(launched: tuple[Path, list[int]]) -> None:
    root, codes = launched
    assert codes[0] == 0, (root / "none" / "log").read_text()
    assert len(list((root / "none").glob("scan-*"))) == 1
    assert _weights(root / "none" / "out")
    assert (root / "none" / "log").read_text().count("block: layers") == 1


def test_an_error_of_the_user_is_said_once(launched: tuple[Path, list[int]]) -> None:
    root, codes = launched
    assert codes[1] == 4
    assert len(_said(root / "none")) == 1
    assert "--overwrite" in _said(root / "none")[0]
    assert set(json.loads((root / "none" / "failures.json").read_text()).values()) <= {2, -15}


def test_either_may_be_killed_and_the_same_command_goes_on(
    launched: tuple[Path, list[int]],
) -> None:
    root, codes = launched
    assert codes[2:6] == [0, 4, 4, 0], (root / "killed" / "log").read_text()
    ended = json.loads((root / "killed" / "failures.json").read_text())
    assert ended["0"] == -signal.SIGKILL
    assert _weights(root / "killed" / "out") == _weights(root / "trained" / "out")
    assert len(list((root / "killed").glob("scan-*"))) == 1
    assert not list((root / "killed" / "cache" / "work").iterdir())
    assert sorted(path.name for path in (root / "killed").glob(".*")) == []


def test_a_loss_that_is_nan_in_one_process_ends_all_with_one_sentence(
    launched: tuple[Path, list[int]],
) -> None:
    root, codes = launched
    assert codes[6] == 4
    assert len(_said(root / "nan")) == 1
    assert "nan at step 4" in _said(root / "nan")[0]
    assert not (root / "nan" / "out").exists()


def test_a_recovery_is_that_of_one_process(launched: tuple[Path, list[int]]) -> None:
    root, codes = launched
    assert codes[7] == 0, (root / "recovered" / "log").read_text()
    two, one = (
        load_file(root / name / "out" / "model.safetensors") for name in ("recovered", "alone")
    )
    assert two.keys() == one.keys()
    assert max(float((two[name] - one[name]).abs().max()) for name in one) < 1e-6
    facts = []
    for name in ("recovered", "alone"):
        manifest = read_manifest(root / name / "out")
        assert manifest is not None
        assert manifest.training is not None
        facts.append(manifest.training["recovery"])
    assert facts[0]["processes"] == 2
    # The texts that the model wrote are the same.
    assert facts[0]["data"] == facts[1]["data"]
    assert facts[0]["data"]["source"] == "self"


def test_a_model_that_no_process_has_whole_is_trained_as_in_one(
    launched: tuple[Path, list[int]],
) -> None:
    """Read layer by layer for the choice and the teacher, and divided for the training."""
    root, codes = launched
    log = (root / "divided" / "log").read_text()
    assert codes[8] == 0, log
    assert "placement: streamed" in log
    divided, whole = (
        load_file(root / name / "out" / "model.safetensors") for name in ("divided", "whole")
    )
    assert divided.keys() == whole.keys()
    assert max(float((divided[name] - whole[name]).abs().max()) for name in whole) < 1e-6
