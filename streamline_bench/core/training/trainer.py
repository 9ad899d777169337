"""Train the network that stands in for a removed block (LLM-Streamline, arXiv:2403.19135)."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import evaluating
from streamline_bench.core.machine.ranks import current
from streamline_bench.core.recipe.schema import ReplacementSpec, TrainingSpec
from streamline_bench.core.recipe.validation import suggest
from streamline_bench.core.streaming import is_streamed
from streamline_bench.core.training.block import (
    Student,
    Teacher,
    pruned,
)
from streamline_bench.core.training.distillation import KdObjective, teacher_logits
from streamline_bench.core.training.loop import (
    STATE_ERRORS,
    DataSet,
    LmObjective,
    Loop,
    Objective,
    StateObjective,
    open_work_folder,
)
from streamline_bench.core.training.sharding import is_sharded, on_host
from streamline_bench.core.training.sources import Sources
from streamline_bench.core.training.state import CosineSchedule, StepPlan
from streamline_bench.core.training.students import Students
from streamline_bench.errors import RecipeError, SparsityError

log = logging.getLogger(__name__)

TRAINING_VERSION = 1
"""Part of the keys of trainings and of compressions with one; raised when the same settings give
other weights than before."""


def training_version(device: str) -> int:
    """Return the version for a type of device: on GPUs AdamW is fused, which rounds otherwise."""
    return TRAINING_VERSION + (device.partition(":")[0] != "cpu")


QUIRKS: Mapping[str, str] = {
    "bidirectional_layer": "a layer is trained by MSE without a causal mask",
    "schedule_per_accumulation": "the schedule spans half the micro-batches and advances once per "
    "optimizer step (mse: an eighth of it is used) or per micro-batch (lm: it wraps)",
    "postnorm_target": "the target is taken after the final norm if the block ends at the last "
    "layer",
}
"""Deviations of the reference implementation that ``reference_quirks`` can switch on."""


@dataclass(frozen=True)
class TrainingResult:
    """A trained replacement or model.

    Attributes:
        state: its weights with the lowest validation loss, float32 on the CPU. Kind ``layer``:
            names as ``0.self_attn.q_proj.weight`` (index among the new layers), else as
            ``up_proj.weight``.
        curve: rows with step, lr, train_loss, val_loss, tokens, seconds; entries that were not
            measured at that step are None.
        summary: what the manifest records; JSON. ``best_step`` and ``best_loss`` are step and value
            of the lowest validation loss.
    """

    state: Mapping[str, Tensor]
    curve: list[dict[str, Any]]
    summary: dict[str, Any]


def train_replacement(
    model: nn.Module,
    *,
    start: int,
    n: int,
    spec: ReplacementSpec,
    training: TrainingSpec,
    tokens: CalibrationTokens,
    work: Path,
    seed: int,
    device: str | torch.device = "cpu",
    progress: bool = True,
    quirks: Sequence[str] = (),
    weights_sha256: str | None = None,
    at_once: int | None = None,
    states: Path | None = None,
) -> TrainingResult:
    """Train the replacement of layers ``start .. start + n - 1`` of ``model``.

    The model is the teacher; it is moved to ``device`` and otherwise left as it was (but for ``lm``
    and ``kd`` where processes divide its weights: it is used up then). ``mse``,
    ``relative_mse`` and ``cosine`` run it up to the end of the block and train the replacement on
    its hidden states (:data:`~streamline_bench.core.training.loop.STATE_ERRORS`); ``lm`` trains
    the replacement inside the pruned model on the next token, ``kd`` on the model's own
    distribution of it; ``none`` returns the initial weights. All run without dropout. A killed
    training continues from its last checkpoint in ``work``; on CPU the result is the same to the
    bit.

    Args:
        n: layers removed, including those that kind ``layer`` puts back.
        tokens: training data; ``training.validation_share`` of the sequences is held out.
        work: folder for checkpoint, activation cache and ``curve.jsonl``.
        quirks: names from :data:`~streamline_bench.core.training.trainer.QUIRKS`.
        weights_sha256: hash of the model's weights if known, to spare computing one.
        at_once: most sequences that the memory holds; larger micro-batches are computed in parts,
            which changes nothing but the rounding.
        states: folder of hidden states that other trainings want as well, filled by the first;
            None: those of this training lie in ``work``. The result is the same to the bit.

    Raises:
        RecipeError: kind ``none``, an unknown quirk, or more new layers than removed ones.
        SparsityError: the block is not inside the model.
        CalibrationError: there are fewer than two sequences.
        NumericsError: a loss is NaN or infinite; the message names the step.
        OutputError: ``work`` cannot be written.
    """
    return train_together(
        model, [range(start, start + n)], spec=spec, training=training, tokens=tokens, work=work,
        seed=seed, device=device, progress=progress, quirks=quirks, weights_sha256=weights_sha256,
        at_once=at_once, states=states,
    )  # fmt: skip


def train_together(
    model: nn.Module,
    blocks: Sequence[range],
    *,
    spec: ReplacementSpec,
    training: TrainingSpec,
    tokens: CalibrationTokens,
    work: Path,
    seed: int,
    device: str | torch.device,
    progress: bool,
    quirks: Sequence[str],
    weights_sha256: str | None,
    at_once: int | None,
    states: Path | None,
) -> TrainingResult:
    """Do what :func:`train_replacement` does, with a replacement for each of several blocks.

    They are trained at once. Names of weights begin with ``cut0.``, ``cut1.``, … where there are
    several blocks; an objective on states is for one block.
    """
    for block in blocks:
        check_block(model, block.start, len(block), spec)
    check_quirks(quirks, spec, training)
    if len(blocks) > 1 and training.objective in STATE_ERRORS:
        raise ValueError(f"objective {training.objective} is that of one block")
    device = torch.device(device)
    # Spread by accelerate, or read layer by layer: it stays where it is.
    if not getattr(model, "hf_device_map", None) and not is_streamed(model):
        model.to(device)
    training = training.computed_on(device.type, dtype_of(model))
    parts = [Student(model, block.start, spec, seed) for block in blocks]
    student = parts[0] if len(parts) == 1 else Students(parts)
    if training.objective == "none":
        summary = {"objective": "none", "kind": spec.kind, "steps": 0}
        return TrainingResult(student.state_on_cpu(), [], summary)
    open_work_folder(work)
    job = _Job(
        model, tuple(blocks), spec, training, tokens, work, seed, device, progress, tuple(quirks),
        at_once, states,
    )  # fmt: skip
    with evaluating(model, frozen=True):
        return job.run(student, weights_sha256)


@dataclass(frozen=True)
class _Job:
    model: nn.Module
    blocks: tuple[range, ...]
    spec: ReplacementSpec
    training: TrainingSpec
    tokens: CalibrationTokens
    work: Path
    seed: int
    device: torch.device
    progress: bool
    quirks: tuple[str, ...]
    at_once: int | None
    states: Path | None

    def run(self, student: Student | Students, weights: str | None) -> TrainingResult:
        training, validation = self.tokens.split(self.training.validation_share, self.seed)
        plan = StepPlan.of(self.training, len(training), self.seed, self.at_once)
        data_key, key = self._keys(weights)
        sets = [training, validation]
        dense = self._dense(sets, data_key)  # before the student is put in
        if is_sharded() and self.training.objective not in STATE_ERRORS:
            on_host(self.model)
        with ExitStack() as stack:
            objective = stack.enter_context(self._objective(student))
            sources, storage = dense or self._sources(sets, plan, student, data_key, stack)
            loop = Loop(
                student=student,
                objective=objective,
                training=self.training,
                plan=plan,
                schedule=self._schedule(plan),
                train=DataSet(training, sources[0]),
                validation=DataSet(validation, sources[1]),
                device=self.device,
                work=self.work,
                key=key,
                progress=self.progress,
            )
            state = loop.run()
        if is_sharded():  # after an interruption only the main process has it
            state.best = current().first(lambda: state.best)
        summary = {
            "objective": self.training.objective, "kind": self.spec.kind,
            **self._placed, **loop.summary(),
            "parameters": sum(tensor.numel() for tensor in state.best.values()),
            "hidden_states": storage, "quirks": list(self.quirks),
        }  # fmt: skip
        return TrainingResult(state.best, state.curve, summary)

    @property
    def _placed(self) -> dict[str, Any]:
        """First layer and number of layers of the block, or of each of several."""
        placed = [[block.start, len(block)] for block in self.blocks]
        return {"block": placed[0]} if len(placed) == 1 else {"blocks": placed}

    @property
    def _hidden_size(self) -> int:
        config: Any = self.model.config
        return int(config.hidden_size)

    def _schedule(self, plan: StepPlan) -> CosineSchedule:
        spec = self.training
        usual = CosineSchedule.of(spec, plan.steps, self._hidden_size)
        if "schedule_per_accumulation" not in self.quirks:
            return usual
        horizon = 0.5 * plan.micro_batches
        stride = spec.gradient_accumulation if spec.objective == "lm" else 1
        share = plan.micro_batches if spec.objective == "lm" else horizon
        warmup = round(spec.warmup_ratio * share)
        return CosineSchedule(usual.peak, usual.minimum, plan.steps, warmup, stride, horizon)

    def _keys(self, weights: str | None) -> tuple[str, str]:
        """Return the keys of the activation cache and of the whole training."""
        stop = self.blocks[-1].stop
        of_states = self.training.objective in STATE_ERRORS
        data: dict[str, Any] = {
            "weights": weights or weights_digest(self.model, stop if of_states else None),
            "tokens": self.tokens.sha256, **self._placed,
            "dtype": str(next(self.model.parameters()).dtype), "autocast": self.training.autocast,
            "share": self.training.validation_share, "seed": self.seed, "device": self.device.type,
            "postnorm": "postnorm_target" in self.quirks,
        }  # fmt: skip
        result = {
            **data,
            "spec": self.spec.model_dump(mode="json"),
            "training": self.training.model_dump(
                mode="json", exclude={"data", "cache_gb", "checkpoint_every"}
            ),
            "quirks": sorted(self.quirks),
        }
        return key_of(**data), key_of(**result)

    @contextmanager
    def _objective(self, student: Student | Students) -> Iterator[Objective]:
        error = STATE_ERRORS.get(self.training.objective)
        if error is not None:
            assert isinstance(student, Student)
            bidirectional = "bidirectional_layer" in self.quirks
            yield StateObjective(student, error, bidirectional=bidirectional)
            return
        parts = [student] if isinstance(student, Student) else student.parts
        with ExitStack() as stack:
            for block, part in zip(self.blocks, parts, strict=True):
                stack.enter_context(pruned(self.model, block.start, len(block), part))
            if self.training.objective == "kd":
                yield KdObjective(self.model, self.training.kd)
            else:
                yield LmObjective(self.model)

    def _dense(self, sets: Sequence[CalibrationTokens], key: str) -> tuple[list[Any], str] | None:
        """Return the dense model's logits of each set for ``kd``, and where they are in words."""
        if self.training.objective != "kd":
            return None
        sources = teacher_logits(
            self.work, key, self.model, sets, self.training.kd, device=self.device,
            progress=self.progress,
        )  # fmt: skip
        return list(sources), f"the {self.training.kd.top_k} largest logits, memory-mapped"

    def _sources(
        self,
        sets: Sequence[CalibrationTokens],
        plan: StepPlan,
        student: Student | Students,
        key: str,
        stack: ExitStack,
    ) -> tuple[list[Any], str]:
        """Return where the states of each set come from, and that in words."""
        if self.training.objective not in STATE_ERRORS:
            return [None for _ in sets], "no hidden states needed"
        assert isinstance(student, Student)
        postnorm, block = "postnorm_target" in self.quirks, self.blocks[0]
        teacher = Teacher(self.model, block.start, len(block), student.num_calls, postnorm)
        half = self.training.autocast == "bf16"
        item = 2 if half else int(next(self.model.parameters()).itemsize)
        sources = Sources(
            teacher, sets, plan, self.training, key, 2 * self._hidden_size * item, self.work,
            self.states, self.device, self.progress,
        )  # fmt: skip
        found, words = sources.open(stack)
        return list(found), words


def check_quirks(quirks: Sequence[str], spec: ReplacementSpec, training: TrainingSpec) -> None:
    """Refuse quirks that do not exist or that would change nothing.

    Raises:
        RecipeError: a quirk is unknown, or says nothing about this kind or objective.
    """
    for quirk in quirks:
        if quirk not in QUIRKS:
            known = ", ".join(QUIRKS)
            raise RecipeError(
                f"Reference quirk '{quirk}' is unknown{suggest(quirk, QUIRKS)} (known: {known})."
            )
    if "bidirectional_layer" in quirks and (spec.kind != "layer" or training.objective != "mse"):
        raise RecipeError(
            "Reference quirk 'bidirectional_layer' concerns kind 'layer' trained by 'mse', not "
            f"'{spec.kind}' by '{training.objective}'; leave it out."
        )
    if "postnorm_target" in quirks and training.objective != "mse":
        raise RecipeError("Reference quirk 'postnorm_target' concerns objective 'mse'.")


def check_block(model: nn.Module, start: int, n: int, spec: ReplacementSpec) -> None:
    """Refuse a block outside the model, or a replacement that does not fit into it.

    Raises:
        SparsityError: the block is outside the model.
        RecipeError: the replacement does not fit into it.
    """
    depth = len(decoder_layers(model))
    if n < 1 or start < 0 or start + n > depth:
        raise SparsityError(
            f"The block of {n} layers from layer {start} is not inside a model of {depth} layers."
        )
    if spec.kind == "none":
        raise RecipeError("Replacement kind 'none' has no weights to train; give another kind.")
    if spec.kind == "layer" and spec.layers > n:
        raise RecipeError(
            f"replacement.layers is {spec.layers}, more than the {n} layers that are removed; "
            "lower it."
        )


def dtype_of(model: nn.Module) -> str:
    """Return torch's name of the dtype of a model's weights."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def weights_digest(model: nn.Module, stop: int | None) -> str:
    """Return the SHA-256 (hex) of a model's weights, without those of layers ``stop`` and later.

    Layers behind the block play no part in hidden-state training, so hashing them is left out.
    """
    unused = set()
    if stop is not None:
        unused = {id(t) for layer in decoder_layers(model)[stop:] for t in layer.parameters()}
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if id(tensor) not in unused:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().data)
    return digest.hexdigest()


def key_of(**facts: Any) -> str:
    """Return the SHA-256 (hex) of facts that JSON can express."""
    version = training_version(facts.get("device", "cpu"))
    payload = json.dumps({**facts, "version": version}, sort_keys=True)
    return hashlib.sha256(payload.encode()).hexdigest()
