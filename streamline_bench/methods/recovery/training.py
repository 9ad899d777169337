"""Trains a compressed model on the next token, with the loop that trains replacements.

A recovery trains LoRA's low-rank updates, the last layers, or everything. Trained parameters are
float32: a step of 1e-5 is lost in bfloat16.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import Architecture, architecture_of, decoder_layers
from streamline_bench.core.architecture_roles import LATENT, projections_of
from streamline_bench.core.checkpoint.writer import LazyTensors
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.machine.ranks import current
from streamline_bench.core.recipe.schema import ProjectionRole, RecoverySpec
from streamline_bench.core.training.distillation import KdObjective, TeacherLogits
from streamline_bench.core.training.loop import DataSet, LmObjective, Loop, open_work_folder
from streamline_bench.core.training.sharding import gathered, is_sharded, put, whole
from streamline_bench.core.training.state import CosineSchedule, StepPlan
from streamline_bench.core.training.trainer import TrainingResult, dtype_of, key_of
from streamline_bench.errors import ArchitectureError, RecipeError

log = logging.getLogger(__name__)


def choose_parameters(
    model: Any, spec: RecoverySpec, seed: int, *, at_once: int | None = None
) -> TrainableParameters:
    """Prepare a model, in place, for the training that ``spec`` names.

    Args:
        at_once: as for :func:`train_recovery`.

    Raises:
        RecipeError, ArchitectureError: what is to be trained is not there.
    """
    if spec.kind == "lora":
        parts = at_once is not None and at_once < spec.training.batch_size
        return LoraParameters(model, spec, seed, parts=parts or current().count > 1)
    if spec.kind == "partial":
        return partial_parameters(model, spec)
    return TrainableParameters(model, dict(model.named_parameters()))  # a tied head stays tied


def train_recovery(
    model: Any,
    trainable: TrainableParameters,
    spec: RecoverySpec,
    tokens: CalibrationTokens,
    work: Path,
    *,
    seed: int,
    device: str | torch.device | None = None,
    weights_sha256: str,
    dense: Sequence[TeacherLogits] = (),
    at_once: int | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Train the chosen parameters of ``model`` where it stands; the model is used up.

    A training that was killed continues from its last checkpoint in ``work``; on CPU the result is
    the same to the bit.

    Args:
        trainable: from :func:`choose_parameters`, of this model.
        tokens: training data; ``validation_share`` of the sequences is held out.
        device: where it is trained; None: where the model is. One whose weights are divided may be
            on the host until then.
        weights_sha256: hash of the model's weights before the training.
        dense: logits of the dense model for training and held-out sequences, for ``kd``.
        at_once: most sequences that the memory holds; larger micro-batches are computed in parts,
            which changes nothing but the rounding.

    Returns:
        Its state has name in the model -> weight, float32 on the CPU, updates of LoRA merged. It is
        made from the model on each access; the model is kept alive.

    Raises:
        CalibrationError: there are fewer than two sequences.
        NumericsError: a loss or gradient is not finite; the message names the step.
        OutputError: ``work`` cannot be written.
    """
    decided = spec.training.computed_on(model.device.type, dtype_of(model))
    spec = spec.model_copy(update={"training": decided})
    training, validation = tokens.split(spec.training.validation_share, seed)
    plan = StepPlan.of(spec.training, len(training), seed, at_once)
    schedule = CosineSchedule.of(spec.training, plan.steps, int(model.config.hidden_size))
    if schedule.warmup >= plan.steps:
        log.warning(
            "recovery: the warm-up (%d steps) is not over when the training (%d steps) ends",
            schedule.warmup,
            plan.steps,
        )
    device = torch.device(model.device if device is None else device)
    open_work_folder(work)
    outside = {"training": {"data", "cache_gb", "checkpoint_every"}}
    key = key_of(
        weights=weights_sha256,
        tokens=tokens.sha256,
        recovery=spec.model_dump(mode="json", exclude=outside),
        seed=seed,
        dtype=str(model.dtype),
        device=device.type,
    )
    loop = Loop(
        student=trainable,
        objective=KdObjective(model, spec.training.kd) if dense else LmObjective(model),
        training=spec.training,
        plan=plan,
        schedule=schedule,
        train=DataSet(training, dense[0] if dense else None),
        validation=DataSet(validation, dense[1] if dense else None),
        device=device,
        work=work,
        key=key,
        progress=progress,
    )
    trained = sum(parameter.numel() for parameter in trainable.named_parameters().values())
    with torch.random.fork_rng():  # steps seed the generators for their dropout
        state = loop.run()
    trainable.load(state.best)
    merged: Mapping[str, Tensor] = trainable.merged()
    if is_sharded():  # which needs all processes, and not when one of them asks
        asked = ((name, merged[name]) for name in trainable.weights)
        merged = {name: tensor for name, tensor in asked if current().main}
    summary = {
        "kind": spec.kind,
        **({"objective": "kd"} if dense else {}),
        "preset": spec.preset,
        "trained_parameters": trained,
        "changed_tensors": len(trainable.weights),
        **({"targets_left_out": dict(trainable.left_out)} if trainable.left_out else {}),
        **loop.summary(),
    }
    return TrainingResult(merged, state.curve, summary)


class TrainableParameters:
    """Some parameters of a model, as the training loop wants them.

    Args:
        model: all its other parameters are frozen, in place.
        chosen: name -> parameter.

    Attributes:
        weights: names, in the model, of the tensors that the training changes.
        left_out: target of the recipe -> why it is not trained, or not everywhere.
    """

    left_out: Mapping[str, str] = {}
    label, task = "recovered model", "recover"

    def __init__(self, model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> None:
        model.eval().requires_grad_(False)
        self.weights = tuple(chosen)
        for parameter in chosen.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        places = {
            id(parameter): (module, name)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
        }
        # Where they are: FSDP puts others in their place.
        self._places = {name: places[id(parameter)] for name, parameter in chosen.items()}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {name: getattr(module, own) for name, (module, own) in self._places.items()}

    def state_on_cpu(self) -> dict[str, Tensor]:
        """Return a copy; of weights that are spread over processes, at the main one alone."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters().items():
            full = whole(parameter).detach()
            if current().main or not is_sharded():
                state[name] = full.to("cpu", copy=True)
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self.named_parameters().items():
            put(parameter, state.get(name))

    draws = False

    def begin(self, step: int | None) -> None:
        """Nothing to prepare: there is no dropout."""

    def take(self, rows: slice, of: int) -> None:
        """Nothing is drawn."""

    def merged(self) -> LazyTensors:
        """Return name in the model -> trained weight, float32 on the CPU, where it stands now."""
        parameters = self.named_parameters()
        return LazyTensors(parameters, lambda name: whole(parameters[name]).detach().cpu())


def partial_parameters(model: Any, spec: RecoverySpec) -> TrainableParameters:
    """Choose the LM head, the final norm and the last layers (arXiv 2411.15558).

    Where the LM head shares the matrix of the embeddings, ``spec.head`` says what is trained.

    Raises:
        RecipeError: there are fewer layers than ``last_layers``.
    """
    family = architecture_of(model.config)
    depth = len(decoder_layers(model))
    if spec.last_layers > depth:
        raise RecipeError(
            f"recovery.last_layers is {spec.last_layers}, and the compressed model has {depth} "
            "layers; lower it."
        )
    head = model.get_submodule(family.lm_head)
    shared = head.weight is model.get_input_embeddings().weight
    if shared and spec.head == "untied":
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    elif shared and spec.head == "tied":
        log.info("recovery: the LM head and the embeddings share a matrix, which is trained")
    paths = [f"{family.layers}.{index}" for index in range(depth - spec.last_layers, depth)]
    heads = [] if spec.head == "frozen" else [family.lm_head]
    wanted = {
        id(parameter)
        for path in (*paths, family.final_norm, *heads)
        if (module := _existing(model, path)) is not None
        for parameter in module.parameters()
    }
    named = model.named_parameters()  # a shared matrix has the name of the embeddings
    chosen = {name: each for name, each in named if id(each) in wanted}
    loaded: torch.dtype = model.dtype
    trainable = TrainableParameters(model, chosen)
    parts = [*decoder_layers(model), _existing(model, family.final_norm), head]
    if loaded != torch.float32:
        for part in parts:
            if part is not None:
                trained = any(parameter.requires_grad for parameter in part.parameters())
                _read_in(part, torch.float32 if trained else loaded)
    return trainable


def _read_in(part: nn.Module, dtype: torch.dtype) -> None:
    """Convert what a part of the model is given to the dtype that it computes in."""
    lowest = torch.finfo(dtype).min  # of masks: float32's would be -inf in bfloat16

    def converted(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(converted(each) for each in value)
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype:
            return value.to(dtype).clamp(min=lowest)
        return value

    def convert(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return converted(args), {name: converted(value) for name, value in kwargs.items()}

    part.register_forward_pre_hook(convert, with_kwargs=True)


def _existing(parent: nn.Module, path: str) -> nn.Module | None:
    """Return a module; None where it is missing.

    OPT-350m has no final norm (nor has a model whose row names none), and a layer of a mixture has
    experts in place of projections.
    """
    try:
        module = parent.get_submodule(path) if path else None
    except AttributeError:
        return None
    return module if isinstance(module, nn.Module) else None  # an unused one may be None


_ADAPTER = "default"  # peft's own name for the first one


class LoraParameters(TrainableParameters):
    """Low-rank updates put into a model, in place.

    Their dropout is the only thing that draws random numbers. It is on in training steps only, and
    its generator is seeded by the number of the step.

    Args:
        parts: micro-batches are computed in parts, here or by several processes.
    """

    def __init__(self, model: Any, spec: RecoverySpec, seed: int, *, parts: bool = False) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers.pytorch_utils import Conv1D

        modules, self.left_out = target_modules(model, spec)
        for role, reason in self.left_out.items():
            log.warning("LoRA leaves the target '%s' out: %s", role, reason)
        layers = architecture_of(model.config).layers
        stored_transposed = any(isinstance(module, Conv1D) for module in modules.values())
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
            lora_dropout=spec.dropout,
            target_modules=[path.removeprefix(f"{layers}.") for path in modules],
            bias="none",
            fan_in_fan_out=stored_transposed,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # Given the whole model, peft takes the names of dense MLPs for those of experts.
            inject_adapter_in_model(config, model.get_submodule(layers))
        self._seed = seed
        self._layers: dict[str, Any] = {path: model.get_submodule(path) for path in modules}
        if parts and spec.dropout:
            for layer in self._layers.values():
                layer.lora_dropout[_ADAPTER] = SharedDropout(spec.dropout)
        self._dropouts = [
            layer.lora_dropout[_ADAPTER]
            for layer in self._layers.values()
            if isinstance(layer.lora_dropout[_ADAPTER], nn.Dropout)
        ]
        self.draws = bool(self._dropouts)
        chosen: dict[str, nn.Parameter] = {}
        for path, layer in self._layers.items():
            chosen[f"{path}.lora_A"] = layer.lora_A[_ADAPTER].weight
            chosen[f"{path}.lora_B"] = layer.lora_B[_ADAPTER].weight
        super().__init__(model, chosen)
        self.weights = tuple(f"{path}.weight" for path in self._layers)

    def take(self, rows: slice, of: int) -> None:
        for dropout in self._dropouts:
            if isinstance(dropout, SharedDropout):
                dropout.rows, dropout.of = rows, of

    def begin(self, step: int | None) -> None:
        """Switch dropout on and seed it for a training step; switch it off for a validation."""
        for dropout in self._dropouts:
            dropout.train(step is not None)
        if step is not None and self._dropouts:
            digest = hashlib.sha256(f"{self._seed} {step}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "big"))

    def merged(self) -> LazyTensors:
        """Return name in the model -> weight with its update added, float32 on the CPU.

        Each is added up when it is asked for: together they are a second model.
        """
        return LazyTensors(self.weights, self._merged)

    @torch.no_grad()
    def _merged(self, name: str) -> Tensor:
        layer = self._layers[name.removesuffix(".weight")]
        weight = layer.get_base_layer().weight
        update = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        with gathered(weight, *update):
            merged: Tensor = weight.float() + layer.get_delta_weight(_ADAPTER)
        return whole(merged).cpu()


class SharedDropout(nn.Dropout):
    """Dropout of some rows of a batch, drawn as for the whole batch in one process.

    Attributes:
        rows: which of the batch's ``of`` rows the input has, along its first dimension.
    """

    rows, of = slice(0, 1), 1

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        times = input.shape[0] // (self.rows.stop - self.rows.start)  # rows and tokens in one
        whole = input.new_ones((self.of * times, *input.shape[1:]))
        kept = nn.functional.dropout(whole, self.p)
        return input * kept[self.rows.start * times : self.rows.stop * times]


def target_modules(model: Any, spec: RecoverySpec) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return path -> projection for the roles in ``spec.targets``, in the order of the layers.

    A plain MLP has no gate, so that this role asks for nothing there. Experts of a mixture are left
    as they are: its attention is trained, and the MLPs of its dense layers. Where the layers differ
    in kind, each gives what it has.

    Returns:
        The projections, and role -> why it is left out (of some layers).

    Raises:
        ArchitectureError: no layer has a projection of these roles.
    """
    family = architecture_of(model.config)
    paths = {role: _paths(family, role) for role in spec.targets}
    found: dict[str, nn.Module] = {}
    layers_of: dict[ProjectionRole, set[int]] = {role: set() for role in paths}
    for index, layer in enumerate(decoder_layers(model)):
        own = projections_of(layer) if family.inferred else {}
        for role, candidates in paths.items():
            for path in candidates or own.get(role, ()):
                if _existing(layer, path) is not None:
                    layers_of[role].add(index)
                    found[f"{family.layers}.{index}.{path}"] = layer.get_submodule(path)
    depth = len(decoder_layers(model))
    left_out: dict[str, str] = {}
    for role, layers in layers_of.items():
        missing = depth - len(layers)
        if not missing or (role == "gate" and _plain(family) and found):
            continue
        if family.experts and role in _MLP_ROLES:
            where = f"of {missing} of the layers " if layers else ""
            left_out[role] = f"the MLPs {where}are mixtures of experts, which LoRA leaves alone"
        else:
            lacking = f"{missing} of {depth} layers have" if layers else "the layers have"
            left_out[role] = f"{lacking} no such projection"
    if not found:
        raise _no_projection(family, paths)
    return found, left_out


_MLP_ROLES = ("gate", "up", "down")


def _plain(family: Architecture) -> bool:
    return bool(family.up) and not (family.experts or family.gate or family.fused_gate_up)


def _no_projection(family: Architecture, roles: Iterable[str]) -> ArchitectureError:
    named = ", ".join(f"'{role}'" for role in roles)
    return ArchitectureError(
        f"Model type '{family.model_type}' has no projection {named} that LoRA can update; "
        "choose others in recovery.targets, or another kind of recovery."
    )


def _paths(family: Architecture, role: str) -> tuple[str, ...]:
    """Return where a layer may have the projections of a role; empty if nowhere."""
    if family.latent and role in LATENT:
        return tuple(f"{family.attention}.{name}" for name in LATENT[role])
    parent, name = {
        "q": (family.attention, family.query or family.fused_qkv),
        "k": (family.attention, family.key or family.fused_qkv),
        "v": (family.attention, family.value or family.fused_qkv),
        "o": (family.attention, family.output),
        "gate": (family.mlp, family.gate or family.fused_gate_up),
        "up": (family.mlp, family.up or family.fused_gate_up),
        "down": (family.mlp, family.down),
    }[role]
    if not name:
        return ()
    return (f"{parent}.{name}" if parent else name,)
