"""The processes of one ``accelerate launch`` or ``torchrun``, which carry out one command together.

Each is a *rank*. The main one (rank 0) does what is done once, and alone writes; the others wait
for it, and take their share where sequences are shared out. One process is the case of one rank,
in which nothing here costs or changes anything. Accelerate starts the group of processes.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from streamline_bench.core.machine.processes import HOST, free_port
from streamline_bench.errors import MissingDependencyError, RecipeError, StreamlineBenchError

if TYPE_CHECKING:
    from torch import Tensor

Given = TypeVar("Given")

_BUCKET = 1 << 24  # elements that are added up in one message: 64 MB of float32
_PATIENCE = timedelta(seconds=5)  # for the main process to say what went wrong
_FOREVER = timedelta(weeks=52)  # a rank may wait for hours; the launcher ends those left behind
_SAID = "streamline_bench/said"


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together.

    Attributes:
        rank: its number; count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0

    def first(self, make: Callable[[], Given]) -> Given:
        """Let the main process do something, alone; every rank gets what it gave, or its error.

        Args:
            make: gives something that can be pickled.
        """
        if self.count == 1:
            return make()
        import torch.distributed as group

        sent: list[Any] = [None, None]
        if self.main:
            try:
                with alone():
                    sent = [make(), None]
            except StreamlineBenchError as error:
                sent = [None, error]
        group.broadcast_object_list(sent)
        if sent[1] is not None:
            raise sent[1]
        given: Given = sent[0]
        return given

    def in_turn(self, make: Callable[[], Given]) -> Given:
        """Let every rank do something alone, the main one first; the others then find its files."""
        if self.count == 1:
            return make()
        made: list[Given] = []
        self.first(lambda: made.append(make()))
        with alone():
            return made[0] if self.main else make()

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.count > 1:
            self.first(lambda: None)  # the main one may be late,
            self.sum_of([0.0])  # or another one

    def sum_of(self, numbers: Sequence[float]) -> list[float]:
        """Add up numbers of all ranks, in float64."""
        if self.count == 1:
            return list(numbers)
        import torch

        tensor = torch.tensor(numbers, dtype=torch.float64, device=_group_device())
        torch.distributed.all_reduce(tensor)
        return [float(number) for number in tensor.tolist()]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device, in place, by their sums over all ranks."""
        if self.count == 1:
            return
        import torch

        bucket: list[Tensor] = []
        for index, tensor in enumerate(tensors):
            bucket.append(tensor)
            if index + 1 < len(tensors) and sum(each.numel() for each in bucket) < _BUCKET:
                continue
            flat = torch.cat([each.reshape(-1) for each in bucket])
            torch.distributed.all_reduce(flat)
            parts = torch.split(flat, [each.numel() for each in bucket])
            for each, total in zip(bucket, parts, strict=True):
                each.copy_(total.view_as(each))
            bucket = []


_current = Ranks()


def current() -> Ranks:
    """Return this process among those that work together now; one of one outside :func:`joined`."""
    return _current


def launched() -> Ranks:
    """Return what the launcher says of this process, by its environment variables.

    Raises:
        RecipeError: they contradict each other.
    """
    given = {name: os.environ.get(name, default) for name, default in _VARIABLES.items()}
    if given["WORLD_SIZE"] == "1":
        return Ranks()
    try:
        numbers = {name: int(value) for name, value in given.items()}
    except ValueError:
        numbers = {}
    if not numbers or not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
        said = ", ".join(f"{name}={value or '(nothing)'}" for name, value in given.items())
        raise RecipeError(
            f"The environment names processes that do not fit together ({said}); start the command "
            "by 'accelerate launch' or 'torchrun', or unset these variables."
        )
    return Ranks(numbers["RANK"], numbers["WORLD_SIZE"])


def on_this_machine() -> int:
    """Return how many processes of this launch share the machine's memory."""
    launch = launched().count
    given = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(int(given), launch) if given.isdecimal() and int(given) else launch


_VARIABLES = {"WORLD_SIZE": "1", "RANK": "", "LOCAL_RANK": ""}


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Work together with the other processes of the launch; all of them leave together.

    Args:
        device: that computes, which decides how the processes talk.

    Raises:
        RecipeError: the launcher's settings contradict each other or the device.
        MissingDependencyError: they ask for DeepSpeed, which is not installed.
    """
    global _current
    ranks = launched()
    if ranks.count == 1 or _current.count > 1:
        yield _current
        return
    start_group(device)
    _current = ranks
    try:
        yield ranks
        ranks.wait()
    finally:
        _current = Ranks()


def start_group(device: str) -> None:
    """Let accelerate start the group of this launch's processes, if it has not."""
    from accelerate import PartialState
    from accelerate.utils import InitProcessGroupKwargs

    cpu = device.partition(":")[0] == "cpu"
    if is_on("ACCELERATE_USE_DEEPSPEED") and find_spec("deepspeed") is None:
        raise MissingDependencyError(
            "Accelerate is set to use DeepSpeed, which is not installed; run: "
            "pip install 'streamline-bench[deepspeed]'"
        )
    if not cpu and is_on("ACCELERATE_USE_CPU"):
        raise RecipeError(
            f"Accelerate is set to use processors only, and the device is {device}; give device "
            "cpu, or launch without --cpu."
        )
    if not cpu:
        own_device(device)
    settings = InitProcessGroupKwargs(timeout=_FOREVER).to_kwargs()
    PartialState(cpu=cpu, **settings)


def is_on(variable: str) -> bool:
    """Whether a launcher has switched something on by an environment variable."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def own_device(device: str) -> str:
    """Return the device of this process: of several GPUs each process has its own.

    Raises:
        RecipeError: a single one was named for several processes, or there are too few.
    """
    if device == "cpu" or launched().count == 1:
        return device
    import torch

    kind, _, index = device.partition(":")
    number = int(os.environ["LOCAL_RANK"])
    if index:
        raise RecipeError(
            f"Each of several processes has a GPU of its own, and the device is {device}; give "
            f"device {kind}."
        )
    if kind == "cuda" and number >= torch.cuda.device_count():
        raise RecipeError(
            f"Process {number} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            "start fewer processes."
        )
    return f"{kind}:{number}"


def run_in_ranks(
    command: Sequence[str], count: int, environment: Mapping[str, str] | None = None
) -> int:
    """Run a command in ``count`` processes of this machine, as torchrun does, and wait for them.

    One process is started as it is. They belong to this process's group and end with it, which
    torchrun's do not. When one fails, the others are ended.

    Args:
        environment: variables where this process has none of these names.

    Returns:
        The exit code of the first that failed, else 0.
    """
    variables = {**(environment or {}), **os.environ}
    if count == 1:
        return subprocess.run(command, stdin=subprocess.DEVNULL, env=variables).returncode
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": HOST,
              "MASTER_PORT": free_port()}  # fmt: skip
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            own = {**common, "RANK": rank, "LOCAL_RANK": rank}
            named = variables | {name: str(value) for name, value in own.items()}
            ranks.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, env=named))
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            time.sleep(0.1)
        return next((code for code in codes if code), 0)
    finally:
        for process in ranks:
            process.terminate()
        for process in ranks:
            try:
                process.wait(_PATIENCE.total_seconds() + 2)  # one may still say what went wrong
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def alone() -> Iterator[None]:
    """Work as the only process for a while, of which the others know nothing."""
    global _current
    before, _current = _current, Ranks()
    try:
        yield
    finally:
        _current = before


def say_once(say: Callable[[], object]) -> None:
    """Say, at the end of a command, what went wrong, once for all ranks.

    An error that all ranks meet is said by the main one; its launcher then ends the others. Where
    that one has none, because it is still at work, the rank that has one says it after a while.
    """
    store, several = _store(), os.environ.get("WORLD_SIZE", "1") != "1"
    if not several or os.environ.get("RANK", "0") in ("", "0"):
        say()
        with suppress(Exception):  # whoever keeps the store may have ended
            if store is not None:
                store.set(_SAID, "yes")
    elif store is None:  # before the ranks have met
        time.sleep(_PATIENCE.total_seconds())
        say()
    else:
        try:
            store.wait([_SAID], _PATIENCE)
        except Exception as error:
            if "imeout" in str(error):  # else the main one has ended, and had something to say
                say()


def _store() -> Any:
    """Return the store that the processes share; None where there is no group."""
    import sys

    if os.environ.get("WORLD_SIZE", "1") == "1" or "torch.distributed" not in sys.modules:
        return None
    import torch.distributed as group

    if not (group.is_available() and group.is_initialized()):
        return None
    return group.distributed_c10d._get_default_store()


def _group_device() -> Any:
    from accelerate import PartialState

    return PartialState().device
