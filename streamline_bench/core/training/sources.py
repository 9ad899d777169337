"""Where the states around a block come from during a training: from the teacher, or from files.

With several epochs, files that the teacher filled once, if they may be as large; with one epoch,
the teacher as the training goes. Where other trainings of a run want the same states (of another
replacement, say, or by another objective), they have files in common: the first one fills them, and
the others run no layer below the block's end.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from streamline_bench.core.data.calibration import CalibrationTokens, held_out_of
from streamline_bench.core.files import LockHeld, LockUnwritable, awaited_lock, file_lock
from streamline_bench.core.machine.ranks import current
from streamline_bench.core.recipe.schema import TrainingSpec
from streamline_bench.core.streaming import is_streamed
from streamline_bench.core.training.block import (
    ActivationCache,
    LayerwiseStates,
    StateSource,
    Teacher,
)
from streamline_bench.core.training.state import StepPlan

log = logging.getLogger(__name__)

_NAMES = ("training", "validation")


@dataclass(frozen=True)
class Sources:
    """What decides where the states of a training come from.

    Attributes:
        sets: training and held-out sequences.
        plan: of the training sequences.
        key: of model, tokens, block and computation.
        bytes_per_token: of the states at both ends of the block.
        work: folder of this training.
        shared: folder of files that several trainings have in common; None: there is none.
    """

    teacher: Teacher
    sets: Sequence[CalibrationTokens]
    plan: StepPlan
    training: TrainingSpec
    key: str
    bytes_per_token: int
    work: Path
    shared: Path | None
    device: torch.device
    progress: bool

    def open(self, stack: ExitStack) -> tuple[list[StateSource], str]:
        """Return the source of each set, and that in words; the stack closes them.

        Raises:
            OutputError: a file cannot be written.
        """
        once = self.plan.epochs == 1
        needed = sum(map(self._bytes, self.sets)) / 1e9
        if once and not (self._may_share and needed <= self.training.cache_gb):
            return self._anew(stack), "streamed"
        if needed > self.training.cache_gb:
            reason = (
                f"recomputed each epoch: a cache of {needed:.3g} GB exceeds training.cache_gb "
                f"{self.training.cache_gb:g}"
            )
            log.warning("activations: %s", reason)
            return self._anew(stack), reason
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.training.autocast == "bf16"
        ):
            # A batch of the one epoch is computed as if it came from the teacher.
            batches = (
                [self._by_step(), self._in_order(1)] if once else [*map(self._in_order, (0, 1))]
            )
            return list(self._kept(batches, stack)), f"memory-mapped, {needed:.3g} GB"

    @property
    def _may_share(self) -> bool:
        """Whether a file gives what the teacher gives in one epoch, to the bit."""
        alone = current().count == 1  # else each process has batches of its own
        # In bfloat16, autocast leaves the teacher's states as they are.
        half = next(self.teacher.model.parameters()).dtype == torch.bfloat16
        return self.shared is not None and alone and (half or self.training.autocast == "none")

    def _bytes(self, tokens: CalibrationTokens) -> int:
        return tokens.input_ids.numel() * self.bytes_per_token

    def _by_step(self) -> list[Tensor]:
        """Rows of this process's batches of training sequences, over all epochs."""
        rank, count = current().rank, current().count
        steps = (self.plan.share_of(step, rank, count) for step in range(self.plan.steps))
        return list(itertools.chain.from_iterable(steps))

    def _in_order(self, number: int) -> list[Tensor]:
        """Rows of the batches of a set, each sequence once, of all processes."""
        return list(torch.split(torch.arange(len(self.sets[number])), self.plan.part))

    def _anew(self, stack: ExitStack) -> list[StateSource]:
        rank, count = current().rank, current().count
        return [*self._teachers([self._by_step(), self._in_order(1)[rank::count]], stack)]

    def _kept(self, batches: list[list[Tensor]], stack: ExitStack) -> Iterator[ActivationCache]:
        """The files, which the teacher fills batch by batch unless they are there."""
        rank, count = current().rank, current().count
        teachers = self._teachers([each[rank::count] for each in batches], stack)
        with ExitStack() as locks:  # of both sets, so that neither makes room for the other
            for number, (rows, teacher) in enumerate(zip(batches, teachers, strict=True)):
                key = _key(self.key, rows)
                path = current().first(partial(self._place, number, key, locks))
                yield ActivationCache(
                    path, key, self.sets[number], teacher, device=self.device, batches=rows,
                    progress=self.progress,
                )  # fmt: skip

    def _place(self, number: int, key: str, locks: ExitStack) -> Path:
        """Where the states of a set lie; another training that wants the same ones waits."""
        own = self.work / f"activations_{_NAMES[number]}.bin"
        if self.shared is None:
            return own
        path = self.shared / f"{key}.bin"
        lock = awaited_lock(path.with_suffix(".lock"), "runs the model for the same states")
        try:
            locks.enter_context(lock)
        except (LockHeld, LockUnwritable) as error:
            log.warning("Hidden states are not shared with other rows: %r", error)
            return own
        if not path.exists():
            _make_room(self.shared, self.training.cache_gb * 1e9 - self._bytes(self.sets[number]))
        return path

    def _teachers(
        self, orders: Sequence[list[Tensor]], stack: ExitStack
    ) -> list[Teacher | LayerwiseStates]:
        """Who computes the states of each set in this order: a streamed model layer by layer."""
        if not is_streamed(self.teacher.model):
            return [self.teacher for _ in orders]
        budgets = divided_budget(self.training, self._bytes(self.sets[1]))
        # Each process has a folder of its own: it deletes the states of others that are there.
        work = self.work if current().main else self.work / f"rank-{current().rank}"
        work.mkdir(exist_ok=True)
        found = list[Teacher | LayerwiseStates]()
        for tokens, order, budget in zip(self.sets, orders, budgets, strict=True):
            source = LayerwiseStates(
                self.teacher, tokens, order, device=self.device, progress=self.progress,
                budget=budget, work=work,
            )  # fmt: skip
            stack.callback(source.close)
            found.append(source)
        return found


def divided_budget(training: TrainingSpec, held_out: int) -> tuple[float, float]:
    """Return how many bytes of states of a streamed model are held: of training, of held-out ones.

    The held-out set is used over and over: it is held throughout where that is possible.

    Args:
        held_out: bytes of its states at both ends of the block.
    """
    limit = training.cache_gb * 1e9
    own = min(2 * held_out, limit / 2)
    return limit - own, own


def times_read(training: TrainingSpec, sequences: int, each: int, at_once: int | None) -> int:
    """Return how often a training reads the layers of a streamed model up to the block's end.

    Once for the states of each set where all of them are held, else once for each part of them. Of
    several processes, each reads at most as often.

    Args:
        sequences: training and held-out ones.
        each: bytes of the states of one sequence at both ends of the block.
        at_once: as for :class:`~streamline_bench.core.training.state.StepPlan`.
    """
    held_out = held_out_of(sequences, training.validation_share)
    plan = StepPlan.of(training, sequences - held_out, 0, at_once)
    in_files = plan.epochs > 1 and sequences * each <= training.cache_gb * 1e9
    rounds = (1, 1) if in_files else (plan.epochs, 1 + min(training.validations, plan.steps))
    budgets = divided_budget(training, held_out * each)
    fitting = [max(1, int(budget // (plan.part * each))) for budget in budgets]
    batches = [math.ceil(rows / plan.part) for rows in (plan.sequences, held_out)]
    parts = [
        math.ceil(count * again / fit)
        for count, again, fit in zip(batches, rounds, fitting, strict=True)
    ]
    # Held-out states that are all held serve every validation.
    return parts[0] + (1 if batches[1] <= fitting[1] else parts[1])


def _key(states: str, batches: Sequence[Tensor]) -> str:
    """Name states, and the batches that they were computed in: in others, digits may differ."""
    rows = json.dumps([states, [each.tolist() for each in batches]])
    return hashlib.sha256(rows.encode()).hexdigest()


def _make_room(folder: Path, size: float) -> None:
    """Delete files that are not being filled, the oldest first, until they have ``size`` bytes.

    A training that reads one goes on with it: its file is mapped.
    """
    whole = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    files = [path.with_suffix(".bin") for path in whole]
    sizes = {path: path.stat().st_size for path in files if path.exists()}
    for path, described in zip(files, whole, strict=True):
        if sum(sizes.values()) <= size:
            return
        with suppress(LockHeld, LockUnwritable), file_lock(path.with_suffix(".lock")):
            described.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            sizes.pop(path, None)
