"""Several processes take the steps that one process takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from streamline_bench.core.machine.processes import free_port

# objective or kind of recovery, and settings of the training
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mse": ("mse", {"epochs": 1, "min_steps": 20}),  # from a file that both fill
    "mse-recomputed": ("mse", {"min_steps": 20, "cache_gb": 0.0, "gradient_accumulation": 2}),
    "lm": ("lm", {"min_steps": 20, "batch_size": 1, "gradient_accumulation": 3}),
    "kd": ("kd", {"min_steps": 20}),
    "lora": ("lora", {"min_steps": 20, "gradient_accumulation": 2}),  # with dropout
    "lora-alone": ("lora", {"batch_size": 1}),  # one process has no row
    "partial": ("partial", {"min_steps": 20}),
    "checkpointing": ("lm", {"min_steps": 20, "gradient_checkpointing": True}),
    "full": ("full", {"min_steps": 20, "checkpoint_every": 4}),
}

ZERO = ("mse", "lm", "kd", "lora", "lora-alone", "partial", "checkpointing", "full")

# One process imports; those of a training are forks of it, joined by gloo.
TRAININGS = """
import json, os, sys, traceback
from importlib.util import find_spec
from pathlib import Path

import accelerate, peft, torch, torch._dynamo, transformers.models.llama.modeling_llama
from safetensors.torch import save_file
from small_llama import small_llama

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.machine.ranks import current, joined, say_once
from streamline_bench.core.recipe.schema import RecoverySpec, ReplacementSpec, TrainingSpec
from streamline_bench.core.training import loop, train_replacement
from streamline_bench.errors import StreamlineBenchError
from streamline_bench.methods.recovery.training import choose_parameters, train_recovery

STEP = loop.Loop._step

def tokens():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 50, (23, 8), generator=generator)
    mask = torch.arange(8) < torch.randint(3, 9, (23, 1), generator=generator)
    return CalibrationTokens.from_tensors(ids.where(mask, 0), mask)

def forbidden(*arguments):
    raise AssertionError("a process other than the main one writes")

def train(work, kind, settings, stop_after=-1):
    if not current().main:
        loop.save_state = loop.atomic_write_text = forbidden
    def step_then_stop(self, *arguments):
        loss = STEP(self, *arguments)
        if self.state.step == stop_after:
            os._exit(9)
        return loss
    loop.Loop._step = step_then_stop
    model = small_llama()
    objective = kind if kind in ("mse", "kd") else "lm"
    training = TrainingSpec(
        **{"objective": objective, "batch_size": 4, "lr": 3e-3, "validation_share": 0.2, **settings}
    )
    if kind in ("mse", "lm", "kd"):
        result = train_replacement(
            model, start=1, n=2, spec=ReplacementSpec(kind="layer"), training=training,
            tokens=tokens(), work=work, seed=3, progress=False,
        )
    else:
        spec = RecoverySpec(kind=kind, training=training, last_layers=1)
        result = train_recovery(
            model, choose_parameters(model, spec, 3), spec, tokens(), work, seed=3,
            weights_sha256="", progress=False,
        )
    if current().main:
        save_file(dict(result.state), work / "result.safetensors")
        (work / "summary.json").write_text(json.dumps(result.summary))

def prepare_deepspeed():
    import deepspeed.ops

    # Compiled on first use for a minute, and not used in trainings.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

def start(ranks, port, folder, cases, stop_after=-1, **settings):
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(settings)
            os._exit(worked(rank, ranks, port, folder, cases, stop_after))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

def worked(rank, ranks, port, folder, cases, stop_after):
    log = open(folder / f"log-{ranks}-{rank}", "w")
    os.dup2(log.fileno(), 2)
    os.dup2(log.fileno(), 1)
    os.environ.update(
        WORLD_SIZE=str(ranks), RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )
    try:
        with joined("cpu"):
            for work, kind, settings in cases:
                work.mkdir(parents=True, exist_ok=True)
                train(work, kind, settings, stop_after)
        return 0
    except StreamlineBenchError as error:
        say_once(lambda: print(error, file=sys.stderr, flush=True))
        return 2
    except BaseException:
        traceback.print_exc()
        return 1

torch.set_num_threads(1)
folder, cases, port = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
codes = {}
for ranks in (1, 2):
    each = [(folder / name / str(ranks), *case) for name, case in cases.items()]
    codes[ranks] = start(ranks, port, folder, each)
resumed = [(folder / "full" / "resumed", *cases["full"])]
codes["begun"] = start(2, port, folder, resumed, 10)
codes["resumed"] = start(3, port, folder, resumed)
each = [(folder / name / "spread", *cases[name]) for name in ("checkpointing", "partial")]
codes["spread"] = start(2, port, folder, each, **FSDP)
stops = [(folder / "full" / "spread-resumed", *cases["full"])]
codes["spread-begun"] = [start(2, port, folder, stops, step, **FSDP) for step in (10, 14)]
codes["spread-resumed"] = start(1, port, folder, stops)
if find_spec("deepspeed"):
    prepare_deepspeed()
    divided = {"stage": 3, "stage3_param_persistence_threshold": 0}  # small weights too
    file = folder / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": divided, "gradient_clipping": "auto"}))
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    stages = {
        "zero2": {**zero, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
        "zero3": {**zero, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)},
    }
    for stage, settings in stages.items():
        each = [(folder / name / stage, *cases[name]) for name in sys.argv[4].split(",")]
        codes[stage] = start(2, port, folder, each, **settings)
        stops = [(folder / "full" / f"{stage}-resumed", *cases["full"])]
        codes[f"{stage}-begun"] = start(2, port, folder, stops, 10, **settings)
        codes[f"{stage}-resumed"] = start(2, port, folder, stops, **settings)
        stops = [(folder / "full" / f"{stage}-left", *cases["full"])]
        codes[f"{stage}-left"] = [
            start(2, port, folder, stops, 6, **settings),
            start(3, port, folder, stops, 14, **settings),
            start(1, port, folder, stops),
        ]
(folder / "codes.json").write_text(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what one and what two processes made of every case."""
    folder = tmp_path_factory.mktemp("trainings")
    port = str(free_port())
    command = [
        sys.executable,
        "-c",
        TRAININGS,
        str(folder),
        json.dumps(CASES),
        port,
        ",".join(ZERO),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, env=environment, check=True, timeout=280)
    return folder


def _difference(folder: Path, other: str) -> float:
    """Return the largest difference between weights of two trainings after their last steps."""
    one, two = (load_file(folder / name / "training.safetensors") for name in ("1", other))
    assert one.keys() == two.keys()
    weights = [name for name in one if name.startswith("weights/")]
    return max(float((one[name] - two[name]).abs().max()) for name in weights)


def _codes(folder: Path) -> dict[str, list[int]]:
    print(*(log.read_text() for log in folder.glob("log-*")))
    codes: dict[str, list[int]] = json.loads((folder / "codes.json").read_text())
    return codes


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(trainings: Path, case: str) -> None:
    codes = _codes(trainings)
    assert (codes["1"], codes["2"]) == ([0], [0, 0])
    assert _difference(trainings / case, "2") < 1e-6
    one, two = (
        json.loads((trainings / case / ranks / "summary.json").read_text()) for ranks in "12"
    )
    assert two.pop("processes") == 2
    assert one["steps"] >= 18
    assert one["best_step"] == two["best_step"]
    assert one["best_loss"] == pytest.approx(two["best_loss"], rel=1e-6, abs=1e-8)
    assert (one["tokens"], one["sequences"]) == (two["tokens"], two["sequences"])


def test_another_number_of_processes_goes_on(trainings: Path) -> None:
    codes = _codes(trainings)
    assert (codes["begun"], codes["resumed"]) == ([9, 9], [0, 0, 0])
    assert _difference(trainings / "full", "resumed") < 1e-6


@pytest.mark.parametrize("case", ["checkpointing", "partial"])
def test_weights_spread_by_fsdp_are_trained_as_in_one_process(trainings: Path, case: str) -> None:
    assert _codes(trainings)["spread"] == [0, 0]
    assert _difference(trainings / case, "spread") < 1e-6
    one, spread = (
        load_file(trainings / case / name / "result.safetensors") for name in ("1", "spread")
    )
    assert {name: tensor.shape for name, tensor in one.items()} == {
        name: tensor.shape for name, tensor in spread.items()
    }


def test_a_training_by_fsdp_goes_on_with_and_without_it(trainings: Path) -> None:
    codes = _codes(trainings)
    assert (codes["spread-begun"], codes["spread-resumed"]) == ([[9, 9], [9, 9]], [0])
    assert _difference(trainings / "full", "spread-resumed") < 1e-6


needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed; run: pip install 'streamline-bench[deepspeed]'",
)


@needs_deepspeed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("case", ZERO)
def test_deepspeed_trains_what_one_process_does(trainings: Path, case: str, stage: str) -> None:
    assert _codes(trainings)[stage] == [0, 0]
    assert _difference(trainings / case, stage) < 1e-6
    one, zero = (load_file(trainings / case / name / "result.safetensors") for name in ("1", stage))
    assert one.keys() == zero.keys()
    assert max(float((one[name] - zero[name]).abs().max()) for name in one) < 1e-6
    told = [
        json.loads((trainings / case / name / "summary.json").read_text()) for name in ("1", stage)
    ]
    assert told[0].get("trained_parameters") == told[1].get("trained_parameters")
    # DeepSpeed would write files of its own, and the other process may not.
    files = [{path.name for path in (trainings / case / name).iterdir()} for name in ("1", stage)]
    assert files[0] == files[1]


@needs_deepspeed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_training_by_deepspeed_goes_on_to_the_bit(trainings: Path, stage: str) -> None:
    codes = _codes(trainings)
    assert (codes[f"{stage}-begun"], codes[f"{stage}-resumed"]) == ([9, 9], [0, 0])
    whole, resumed = (
        load_file(trainings / "full" / name / "training.safetensors")
        for name in (stage, f"{stage}-resumed")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@needs_deepspeed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_it_goes_on_by_three_processes_and_without_deepspeed(trainings: Path, stage: str) -> None:
    assert _codes(trainings)[f"{stage}-left"] == [[9, 9], [9, 9, 9], [0]]
    assert _difference(trainings / "full", f"{stage}-left") < 1e-6
