"""Trainings of the small model by launches of several processes, joined by gloo.

As a program, it imports once, and the processes of all launches are forks of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Case = tuple[str, dict[str, Any]]
"""Objective or kind of recovery, and settings of the training; ``stored``: the model's dtype."""


@dataclass(frozen=True)
class Launch:
    """Processes that train one thing after another.

    Attributes:
        ranks: number of processes.
        trainings: folder of each -> case.
        variables: of the environment, as a launcher sets them.
        dies_after: step after which the last process dies at once; -1: none.
        spoiled: gradients of the last process are infinite.
        in_parts: the head runs for a few positions at a time.
        wide: recoveries compute in float32 whatever is stored, as DeepSpeed does.
    """

    ranks: int
    trainings: Mapping[str, Case]
    variables: Mapping[str, str] = field(default_factory=dict)
    dies_after: int = -1
    spoiled: bool = False
    in_parts: bool = False
    wide: bool = False


def launched(folder: Path, launches: Mapping[str, Launch]) -> dict[str, list[int]]:
    """Carry out launches in their order; return their names -> the exit codes of processes."""
    from streamline_bench.core.machine.processes import free_port

    plan = folder / "plan.json"
    plan.write_text(json.dumps({name: asdict(launch) for name, launch in launches.items()}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(plan), str(free_port())]
    subprocess.run(command, env=environment, check=True, timeout=500)
    codes: dict[str, list[int]] = json.loads((folder / "codes.json").read_text())
    return codes


def difference(folder: Path, one: str, other: str) -> float:
    """Return the largest difference between weights of two trainings after their last steps."""
    from safetensors.torch import load_file

    first, second = (load_file(folder / name / "training.safetensors") for name in (one, other))
    assert first.keys() == second.keys()
    weights = [name for name in first if name.startswith("weights/")]
    return max(float((first[name] - second[name]).abs().max()) for name in weights)


def main(plan: str, port: str) -> None:
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import torch
    import torch._dynamo
    import transformers.models.llama.modeling_llama  # noqa: F401

    with suppress(ImportError):
        import deepspeed  # noqa: F401
    torch.set_num_threads(1)
    folder, codes = Path(plan).parent, {}
    for name, launch in json.loads(Path(plan).read_text()).items():
        children = []
        for rank in range(launch["ranks"]):
            child = os.fork()
            if child == 0:
                os._exit(_worked(rank, port, folder / f"{name}-{rank}.log", Launch(**launch)))
            children.append(child)
        codes[name] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        (folder / "codes.json").write_text(json.dumps(codes))


def _worked(rank: int, port: str, log: Path, launch: Launch) -> int:
    from streamline_bench.core.machine.ranks import joined, say_once
    from streamline_bench.errors import StreamlineBenchError

    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    count = str(launch.ranks)
    os.environ.update(
        launch.variables, WORLD_SIZE=count, RANK=str(rank), LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    try:
        with joined("cpu"):
            for work, (kind, settings) in launch.trainings.items():
                _train(log.parent / work, kind, settings, launch)
        return 0
    except StreamlineBenchError as error:
        told = str(error)
        say_once(lambda: print(told, file=sys.stderr, flush=True))
        return 2
    except BaseException:
        traceback.print_exc()
        return 1


def _train(work: Path, kind: str, settings: dict[str, Any], launch: Launch) -> None:
    import torch
    from safetensors.torch import save_file
    from small_llama import small_llama

    from streamline_bench.core.machine.ranks import current
    from streamline_bench.core.recipe.schema import RecoverySpec, ReplacementSpec, TrainingSpec
    from streamline_bench.core.training import head, train_replacement
    from streamline_bench.methods.recovery.training import choose_parameters, train_recovery

    work.mkdir(parents=True, exist_ok=True)
    _watch(launch)
    if launch.in_parts:
        head.WHOLE = 0
    stored = getattr(torch, settings.pop("stored", "float32"))
    model = small_llama().to(stored)
    objective = kind if kind in ("mse", "kd") else "lm"
    training = TrainingSpec(
        **{"objective": objective, "batch_size": 4, "lr": 3e-3, "validation_share": 0.2, **settings}
    )
    if kind in ("mse", "lm", "kd"):
        result = train_replacement(
            model, start=1, n=2, spec=ReplacementSpec(kind="layer"), training=training,
            tokens=_tokens(), work=work, seed=3, progress=False,
        )  # fmt: skip
    else:
        spec = RecoverySpec(kind=kind, training=training, last_layers=1)
        chosen = choose_parameters(model, spec, 3)
        if launch.wide:
            model.float()
        result = train_recovery(
            model, chosen, spec, _tokens(), work, seed=3, weights_sha256="", progress=False
        )
    if current().main:
        save_file(dict(result.state), work / "result.safetensors")
        (work / "summary.json").write_text(json.dumps(result.summary))


def _watch(launch: Launch) -> None:
    """Have the last process die or give infinite gradients; no other than the first may write."""
    import torch

    from streamline_bench.core.machine.ranks import current
    from streamline_bench.core.training import loop

    def forbidden(*arguments: Any) -> None:
        raise AssertionError("a process other than the main one writes")

    step = loop.Loop._step

    def watched_step(self: loop.Loop) -> float:
        if launch.spoiled and not self.state.step:
            parameter = next(iter(self.student.named_parameters().values()))
            parameter.register_hook(lambda gradient: gradient * torch.inf)
        loss = step(self)
        if self.state.step == launch.dies_after:
            os._exit(9)
        return loss

    if not current().main:
        loop.save_state = loop.atomic_write_text = forbidden
    if current().rank == launch.ranks - 1 and (launch.spoiled or launch.dies_after > 0):
        loop.Loop._step = watched_step  # type: ignore[method-assign]


def _tokens() -> Any:
    import torch

    from streamline_bench.core.data.calibration import CalibrationTokens

    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 50, (23, 8), generator=generator)
    mask = torch.arange(8) < torch.randint(3, 9, (23, 1), generator=generator)
    return CalibrationTokens.from_tensors(ids.where(mask, 0), mask)


if __name__ == "__main__":
    main(*sys.argv[1:])
