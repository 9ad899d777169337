"""Removes experts of mixtures; with the criterion ``reap`` it is REAP (arXiv 2510.13999).

REAP scores an expert j by what it adds where it is chosen: over the tokens x routed to it, the mean
of ``g_j(x) * ||f_j(x)||_2``, its router weight as the model applies it times the norm of what it
gives. In every layer with experts equally many are removed, those of lowest score; their rows leave
the router, and everything else stays, shared experts included. The result is a stock checkpoint
with fewer experts. Experts that stay are copied byte by byte.

Other criteria: ``frequency``, tokens routed to the expert; ``ean``, the sum of the norms;
``random``, drawn by the seed.

Differences from the authors' code: router weights are those the model itself applies (it takes the
softmax over all experts, and normalises it only where the config says ``norm_topk_prob``, so that
Mixtral's are not normalised); biases of routers and correction biases are sliced along; experts
chosen in groups lose equally many in each group, so that groups stay what they are; fewer experts
than a token is routed to are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from streamline_bench.core.architecture import (
    Architecture,
    architecture_of,
    decoder_layers,
    depth_of,
)
from streamline_bench.core.architecture_inference import meta_model
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import LazyTensors, layer_names, layers_prefix
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.core.surgery import Removal, model_sizes
from streamline_bench.errors import ArchitectureError, SparsityError, library_errors
from streamline_bench.methods.base import Compressed, Compression, Method, Size
from streamline_bench.methods.tools.activations import require_finite, visit_inputs
from streamline_bench.methods.tools.layer_removal import config_json
from streamline_bench.methods.tools.sizes import Stored, short_share, stored_bytes

Criterion = Literal["reap", "frequency", "ean", "random"]

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Config entries that count routed experts, by family."""

_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk")
_GROUPS = ("n_group", "num_expert_group")
_CHOSEN_GROUPS = ("topk_group",)
_RANKED = 2
"""Experts of each group by which routers rank groups."""
_STORED_ROUTER = "gate"
"""What files call a router that the model calls otherwise (Phi-3.5-MoE's)."""

EXPERTS_FILE = "removed_experts.json"


class ExpertParameters(Frozen):
    """Parameters of the method ``expert_pruning``.

    Attributes:
        criterion: see the module.
        ratio: share of each layer's experts to remove, rounded down, instead of a sparsity (the
            authors' compression ratio).
        batch_size: sequences in one pass.
    """

    criterion: Criterion = "reap"
    ratio: float | None = Field(None, gt=0, lt=1)
    batch_size: int = Field(1, ge=1)


@dataclass(frozen=True)
class Mixture:
    """Which experts a model has.

    Attributes:
        key: the config entry that counts them.
        experts: of each layer that has some; ``chosen``: to how many a token is routed.
        groups: in how many groups they are chosen; 1 where there are none.
        least: how many must stay, so that a token can still be routed to ``chosen`` of them.
        layers: the layers with experts.
        expert_size: parameters of one expert with its part of the router.
        total, embeddings: parameters of the whole model, and of embeddings and LM head.
    """

    key: str
    experts: int
    chosen: int
    groups: int
    least: int
    layers: tuple[int, ...]
    expert_size: int
    total: int
    embeddings: int


@dataclass(frozen=True, kw_only=True)
class ExpertPlan(Removal):
    """How many experts each layer loses."""

    experts_before: int
    experts_after: int
    layers: int


class ExpertPruning(Method):
    """Experts of least router-weighted activation, frequency or norm, or at random."""

    name = "expert_pruning"
    streamed = True
    parameters: ClassVar[type[BaseModel]] = ExpertParameters
    removes = "experts"

    def reads_calibration(self, parameters: Mapping[str, Any]) -> bool:
        return ExpertParameters.model_validate(parameters).criterion != "random"

    def reads_seed(self, parameters: Mapping[str, Any]) -> bool:
        return ExpertParameters.model_validate(parameters).criterion == "random"

    def sizes(self, work: Compression) -> Iterator[Size]:
        """Yield the model with fewer experts, one step after the other."""
        mixture, stored = mixture_of(work.config), Stored.of(work.reader)
        every = dict.fromkeys(mixture.layers, range(mixture.experts))
        names, sliced = pruned_tensors(work.reader, work.config, mixture, every)
        fewer = range(mixture.experts - mixture.groups)
        kept, _ = pruned_tensors(work.reader, work.config, mixture, dict.fromkeys(every, fewer))
        single = (stored_bytes(work.reader, old) for new, old in names.items() if new not in kept)
        fused = sum(stored_bytes(work.reader, name) for name in sliced)
        step = sum(single) + fused // mixture.experts * mixture.groups
        least = len(mixture.layers) * mixture.expert_size * mixture.groups
        for count in range(1, (mixture.experts - mixture.least) // mixture.groups + 1):

            def same(sparsity: float, count: int = count) -> bool:
                return plan_experts(mixture, sparsity=sparsity).removed == count * least

            share = short_share(count * least / mixture.total, same)
            if share is not None:
                yield stored.less(
                    {"sparsity": share}, parameters=count * least, nbytes=count * step
                )

    def compress(self, work: Compression) -> Compressed:
        """Score the experts of every layer, keep the highest, slice the routers."""
        options = ExpertParameters.model_validate(work.recipe.parameters)
        mixture = mixture_of(work.config)
        plan = plan_experts(mixture, sparsity=work.recipe.sparsity, ratio=options.ratio)
        tokens = None
        if options.criterion == "random":
            draw = torch.Generator().manual_seed(work.recipe.seed)
            scores = {
                layer: torch.rand(mixture.experts, generator=draw, dtype=torch.float64)
                for layer in mixture.layers
            }
        else:
            tokens = work.tokens(work.recipe.calibration)
            scores = score_experts(work, mixture, options, tokens)
        kept = {
            layer: keep_experts(of_layer, plan.experts_after, mixture.groups)
            for layer, of_layer in scores.items()
        }
        names, tensors = pruned_tensors(work.reader, work.config, mixture, kept)
        config = _with_experts(work.config, mixture.key, plan.experts_after)
        removed = {
            str(layer): sorted(set(range(mixture.experts)) - set(stays))
            for layer, stays in kept.items()
        }
        return Compressed(
            config=config_json(config),
            names=names,
            tensors=tensors,
            layers_after=depth_of(work.config),
            chosen={"criterion": options.criterion, "size": asdict(plan)},
            calibration=tokens.summary() if tokens is not None else {},
            artefacts={EXPERTS_FILE: json.dumps(removed) + "\n"},
        )


def mixture_of(config: Any) -> Mixture:
    """Return what experts a model of this config has.

    Raises:
        ArchitectureError: it has none, or they cannot be removed; the message gives the reason.
    """
    family = architecture_of(config)
    what = f"Experts of model type '{family.model_type}' cannot be removed"
    other = "use a method that removes layers"
    if not family.experts or not family.router:
        raise ArchitectureError(f"{what}: its layers are not known to have any; {other}.")
    shapes, parameters = _shapes(config)
    router = re.compile(
        rf"{re.escape(family.layers)}\.(\d+)\.{re.escape(_joined(family, family.router))}\."
    )
    layers = sorted({int(found[1]) for name in shapes if (found := router.match(name))})
    chosen = next((int(n) for key in _CHOSEN if (n := getattr(config, key, None))), 0)
    key = next((key for key in COUNTS if isinstance(getattr(config, key, None), int)), "")
    key = config.attribute_map.get(key, key)  # the file has one of two names
    if not layers or not key or not chosen:
        raise ArchitectureError(f"{what}: its config does not say how many there are; {other}.")
    experts = int(getattr(config, key))
    groups = next((int(n) for name in _GROUPS if (n := getattr(config, name, None))), 1)
    open_groups = next((int(n) for name in _CHOSEN_GROUPS if (n := getattr(config, name, None))), 1)
    least = _least(chosen, groups, open_groups)
    if experts - groups < least:
        grouped = f" of {groups} groups, {open_groups} at a time" if groups > 1 else ""
        raise ArchitectureError(
            f"{what}: of {experts} experts{grouped} each token is routed to {chosen}; {other}."
        )
    fewer, _ = _shapes(_with_experts(config, key, experts - groups))
    path = re.compile(
        rf"{re.escape(family.layers)}\.\d+\."
        rf"({re.escape(_joined(family, family.experts))}|"
        rf"{re.escape(_joined(family, family.router))})\."
    )
    size = 0
    for name, shape in shapes.items():
        changed = fewer.get(name, ())
        if changed == shape:
            continue
        if not path.match(name) or changed != (experts - groups, *shape[1:]):
            raise ArchitectureError(
                f"{what}: with fewer of them '{name}' has another shape, {list(changed)} instead "
                f"of {list(shape)}; {other}."
            )
        size += math.prod(shape[1:]) if name in parameters else 0
    if not size:
        raise ArchitectureError(f"{what}: '{key}' of its config does not count them; {other}.")
    sizes = model_sizes(config)
    return Mixture(
        key, experts, chosen, groups, least, tuple(layers), size // len(layers), sizes.total,
        sizes.embeddings,
    )  # fmt: skip


def _least(chosen: int, groups: int, open_groups: int) -> int:
    """Return how many experts must stay: those of the open groups are those that are chosen."""
    if groups == 1:
        return chosen
    return groups * max(_RANKED, math.ceil(chosen / open_groups))


def _joined(family: Architecture, name: str) -> str:
    return f"{family.mlp}.{name}" if family.mlp else name


def _shapes(config: Any) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes of parameters and of buffers (some correction biases are), and the parameters."""
    model = meta_model(config)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    shapes = {name: tuple(tensor.shape) for name, tensor in (parameters | buffers).items()}
    return shapes, set(parameters)


def _with_experts(config: Any, key: str, experts: int) -> Any:
    kind = type(config)
    with library_errors(f"A config with {experts} experts", kind=ArchitectureError):
        return kind.from_dict({**config.to_dict(), key: experts})


def plan_experts(
    mixture: Mixture, *, sparsity: float | None = None, ratio: float | None = None
) -> ExpertPlan:
    """Return how many experts stay in each layer.

    Args:
        sparsity: share of the model's parameters to remove.
        ratio: share of the experts to remove instead, rounded down.

    Raises:
        SparsityError: neither or both are given, or it is out of reach.
    """
    if (sparsity is None) == (ratio is None):
        raise SparsityError(
            "Give a sparsity (share of parameters to remove) or the parameter ratio (share of "
            "experts to remove), one of the two."
        )
    step, per_expert = mixture.groups, len(mixture.layers) * mixture.expert_size
    most = (mixture.experts - mixture.least) // step * step
    if ratio is not None:
        gone = math.floor(ratio * mixture.experts + 1e-9) // step * step
    else:
        assert sparsity is not None
        gone = math.floor(sparsity * mixture.total / per_expert / step + 0.5) * step
    if not 0 < gone <= most:
        asked = f"Sparsity {sparsity}" if ratio is None else f"Ratio {ratio}"
        raise SparsityError(
            f"{asked} is out of reach: of {mixture.experts} experts in {len(mixture.layers)} "
            f"layers {step} to {most} can be removed, {step * per_expert / mixture.total:.4f} to "
            f"{most * per_expert / mixture.total:.4f} of the parameters, as a token can be routed "
            f"to {mixture.chosen} while {mixture.least} stay; choose a share in that range."
        )
    removed = gone * per_expert
    return ExpertPlan(
        experts_before=mixture.experts, experts_after=mixture.experts - gone,
        layers=len(mixture.layers), removed=removed, total=mixture.total,
        embeddings=mixture.embeddings, requested=sparsity,
    )  # fmt: skip


def score_experts(
    work: Compression, mixture: Mixture, options: ExpertParameters, tokens: Any
) -> dict[int, Tensor]:
    """Return the score of each expert, layer -> float64 ``[experts]`` on the CPU.

    Raises:
        ArchitectureError: the layer calls its experts in another way than with states, the chosen
            experts and their weights.
    """
    model = work.model
    family = architecture_of(work.config)
    path = _joined(family, family.experts)
    sums: dict[int, _Sums] = defaultdict(lambda: _Sums(mixture.experts))

    def visit(layer: int, _: str, *inputs: Tensor) -> None:
        module = decoder_layers(model)[layer].get_submodule(path)
        sums[layer].add(module, _routing(inputs, mixture, family), options.criterion)

    visit_inputs(
        model, {layer: [path] for layer in mixture.layers}, tokens, visit,
        batch_size=options.batch_size, work=work.work, progress=work.progress,
    )  # fmt: skip
    return {layer: found.scores(options.criterion, layer) for layer, found in sums.items()}


def _routing(
    inputs: Sequence[Tensor], mixture: Mixture, family: Architecture
) -> tuple[Tensor, Tensor, Tensor]:
    """Return states ``[tokens, hidden]``, chosen experts and their weights ``[tokens, chosen]``."""
    if len(inputs) == 3:
        states, chosen, weights = inputs
        same = chosen.shape == weights.shape == (len(states), mixture.chosen)
        if same and not chosen.is_floating_point() and weights.is_floating_point():
            return states, chosen, weights
    raise ArchitectureError(
        f"Experts of model type '{family.model_type}' cannot be scored: its layers do not call "
        "them with states, chosen experts and weights; take criterion 'random', or a method that "
        "removes layers."
    )


class _Sums:
    """Over the tokens routed to each expert of one layer: how many, norms, weighted norms."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._sums: dict[str, Tensor] = {}

    def add(
        self, module: Any, routing: tuple[Tensor, Tensor, Tensor], criterion: Criterion
    ) -> None:
        states, chosen, weights = routing
        for slot in range(chosen.shape[1]):  # so that each expert's own output is seen
            one = chosen[:, slot]
            self._add("frequency", one, torch.ones(len(one), device=one.device))
            if criterion == "frequency":
                continue
            alone = torch.ones_like(weights[:, :1])
            # Not a call: the hook that shows the inputs hangs there.
            given = module.forward(states, one[:, None], alone)
            norms = torch.linalg.vector_norm(given.float(), dim=-1)
            self._add("ean", one, norms)
            self._add("reap", one, norms * weights[:, slot].float())

    def _add(self, name: str, experts: Tensor, values: Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = torch.zeros(
                self._experts, dtype=torch.float64, device=experts.device
            )
        self._sums[name].index_add_(0, experts, values.double())

    def scores(self, criterion: Criterion, layer: int) -> Tensor:
        found = self._sums[criterion].cpu()
        require_finite(found, layer)
        # An expert that no token was routed to has score 0.
        count = self._sums["frequency"].cpu().clamp(min=1)
        return found / count if criterion == "reap" else found


def keep_experts(scores: Tensor, count: int, groups: int = 1) -> list[int]:
    """Return the experts that stay, in increasing order; of equal scores the lower index goes.

    Args:
        groups: each keeps equally many.
    """
    experts = torch.arange(len(scores)).view(groups, -1)
    gone = (len(scores) - count) // groups
    order = torch.argsort(scores.view(groups, -1), dim=1, stable=True)[:, gone:]
    return sorted(int(each) for each in experts.gather(1, order).view(-1))


def pruned_tensors(
    reader: CheckpointReader, config: Any, mixture: Mixture, kept: Mapping[int, Sequence[int]]
) -> tuple[dict[str, str], LazyTensors]:
    """Return new name -> old one of copied tensors, and the tensors that are sliced.

    Tensors of one expert are copied under its new number; those that hold all experts of a layer
    (fused experts, routers, their biases) are sliced along their first dimension.

    Raises:
        ArchitectureError: the checkpoint holds a layer's experts in an unknown form.
    """
    family = architecture_of(config)
    prefix = layers_prefix(reader, family)
    single = re.compile(
        re.escape(prefix) + rf"\.(\d+)\.(.*\b{re.escape(family.experts)})\.(\d+)\.(.+)"
    )
    # Checkpoints may spell the MLP otherwise than the model does.
    whole = re.compile(
        re.escape(prefix)
        + rf"\.(\d+)\.[^.]+\.({re.escape(family.router)}|{re.escape(family.experts)}|"
        + rf"{_STORED_ROUTER}|moe_statics)\.[^.]+(\.[^.]+)?"
    )
    names: dict[str, str] = {}
    slices: dict[str, Tensor] = {}
    seen: set[int] = set()
    for new, old in layer_names(reader, family, range(depth_of(config))).items():
        if (found := single.fullmatch(old)) and int(found[1]) in kept:
            layer, number = int(found[1]), int(found[3])
            seen.add(layer)
            if number in kept[layer]:
                place = list(kept[layer]).index(number)
                names[f"{prefix}.{layer}.{found[2]}.{place}.{found[4]}"] = old
        elif (found := whole.fullmatch(old)) and int(found[1]) in kept:
            layer, shape = int(found[1]), reader.entry(old).shape
            if not shape or shape[0] != mixture.experts:
                raise ArchitectureError(
                    f"'{old}' of {reader.folder} has shape {list(shape)}, and its first dimension "
                    f"is not one of {mixture.experts} experts, so that they cannot be removed; use "
                    "a method that removes layers."
                )
            if found[2] == family.experts:
                seen.add(layer)
            slices[new] = torch.tensor(kept[layer])
        else:
            names[new] = old
    if missing := sorted(set(kept) - seen):
        raise ArchitectureError(
            f"{reader.folder} has no experts of layer {missing[0]} under '{family.experts}'; use a "
            "method that removes layers."
        )
    return names, LazyTensors(
        slices, lambda name: reader.tensor(name).index_select(0, slices[name])
    )
