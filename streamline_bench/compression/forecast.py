"""How much memory a compression will take, from the headers of its checkpoint and its recipe.

A compression works in stages (calibration passes, training, recovery). For each stage the parts
that are in memory together are added up; the stage with the largest sum is the peak. Sizes are
those of weights and states that the stage holds by name, not those of single operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from streamline_bench.core.architecture import architecture_of, sequence_limit
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.corpora import local_paths
from streamline_bench.core.data.corpus_files import file_kind
from streamline_bench.core.recipe.schema import CalibrationSpec, Recipe, TrainingSpec
from streamline_bench.core.replacement import network_parameters
from streamline_bench.core.surgery import model_sizes
from streamline_bench.core.training.distillation import LOGITS_AT_ONCE
from streamline_bench.core.training.head import positions_at_once
from streamline_bench.core.training.loop import STATE_ERRORS
from streamline_bench.core.training.sharding import Division, division
from streamline_bench.core.training.sources import times_read
from streamline_bench.methods.base import get_method
from streamline_bench.methods.tools.normal_equations import WIDENED_ROWS
from streamline_bench.methods.tools.selection import AnySelection
from streamline_bench.modeling.loading import SourceModel, dtype_name

Parts = dict[str, int]
"""What is in memory together: name -> bytes."""

STATES, BEST, LAYER, OTHER = "hidden states", "best weights", "weights of a layer", "libraries"
HOSTED, LOGITS = "weights on the host", "logits of the dense model"
"""Names of parts that are looked up."""

_SEQUENCES = 128
"""Of a recipe that takes all text there is."""
_WIDEST = 16
"""Most values that a layer holds per token, in hidden sizes: of many experts few are active."""
_LOSS_BYTES = 12
"""Per logit besides the logit itself: float32, its log-softmax, its gradient."""
_DISTILLED_BYTES = 12
"""Per logit of one sequence of the teacher: float32, a copy without the largest, an exponential."""
_TRAINED = {"trained weights": 4, "gradients": 4, "optimiser": 8, BEST: 4}
"""Bytes per trained parameter, all float32; the best ones are on the CPU."""
_CHECKPOINT = 4 + 8 + 4
"""Bytes per trained parameter of the copies on the CPU that a checkpoint is written from."""
_SQUARE = 6 * 8
"""Bytes per entry of a matrix of channels by channels that is solved or turned in float64."""
_ZERO = 4
"""Bytes per trained parameter of the copies that DeepSpeed divides and changes."""
_UNITS = 2
"""Parts of divided weights that are whole: one computes, the next one is gathered."""
_LIBRARIES = 5_000_000
"""Tokenizer, texts and what libraries keep."""
_BUFFERS = 16_000_000
"""With which files are read and written."""


@dataclass(frozen=True)
class Forecast:
    """The most memory that a compression will take, in bytes by part; of each process of a launch.

    Attributes:
        streamed: the weights are read layer by layer.
        at_once: sequences that a training computes together; None: nothing is trained.
        stage: which one takes the most memory of the device that computes.
        host: the most that lies in the machine's memory.
        device: the most that lies on the accelerator; empty where the CPU computes.
        files: what lies on the disk while it works: hidden states beyond a budget and those that a
            training of several epochs keeps, logits of the dense model, and the compressed model
            that a recovery begins with.
        processes: that train together, and of which each takes that.
        reads: how often a training on hidden states reads layers of a streamed model, and bytes
            that it reads altogether, at most; (0, 0): it reads none.
    """

    streamed: bool
    at_once: int | None
    stage: str
    host: Parts = field(default_factory=dict)
    device: Parts = field(default_factory=dict)
    files: Parts = field(default_factory=dict)
    processes: int = 1
    reads: tuple[int, int] = (0, 0)

    @property
    def file_bytes(self) -> int:
        """Bytes on the disk."""
        return sum(self.files.values())

    @property
    def host_bytes(self) -> int:
        """Bytes in the machine's memory."""
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        """Bytes on the accelerator."""
        return sum(self.device.values())


@dataclass(frozen=True)
class _Sizes:
    """Of a model: bytes as it is stored, numbers of parameters, and bytes of one in memory."""

    stored: int
    total: int
    layer: int
    head: int
    outside: int
    depth: int
    hidden: int
    vocabulary: int
    item: int

    @classmethod
    def of(cls, reader: CheckpointReader, config: Any, item: int) -> _Sizes:
        sizes = model_sizes(reader)
        row = architecture_of(config)
        heads = tuple(f"{path}." for path in (row.lm_head, row.stored_path(row.lm_head)))
        counts = reader.parameter_counts.items()
        head = sum(count for name, count in counts if name.startswith(heads))
        outside = sizes.total - sum(sizes.layers) - head
        vocabulary, hidden = reader.entry(reader.embeddings_name).shape[-2:]
        return cls(
            reader.stored_bytes, sizes.total, max(sizes.layers), head, outside, len(sizes.layers),
            hidden, vocabulary, item,
        )  # fmt: skip

    @property
    def width(self) -> int:
        """Values that a layer computes for one token, about."""
        return int(min(self.layer / self.hidden, _WIDEST * self.hidden))

    def state(self, tokens: int) -> int:
        """Bytes of the states of so many tokens at one boundary."""
        return tokens * self.hidden * self.item


def forecast(
    source: SourceModel,
    recipe: Recipe,
    *,
    device: str,
    dtype: str | None,
    streamed: bool,
    at_once: int | None = None,
    budget: int | None = None,
) -> Forecast:
    """Return what a compression will take; no weights are read.

    Args:
        dtype: of the weights in memory; None for float32.
        at_once: sequences that a training computes together; None: its micro-batches.
        budget: bytes of hidden states beyond which they lie in files; None: they never do.
    """
    import torch

    if not _computes(recipe):
        return Forecast(streamed, None, "files", {OTHER: _LIBRARIES + _BUFFERS})
    item = getattr(torch, dtype_name(dtype)).itemsize
    sizes = _Sizes.of(source.reader, source.config, item)
    training = trained(recipe)
    if training is not None and at_once is None:
        at_once = training.batch_size
    shared = Division() if training is None else division()
    job = _Job(sizes, recipe, source.config, streamed, at_once or 1, shared, source.folder)
    weights = {} if streamed else {"weights": sizes.total * item}
    stages: dict[str, Parts] = {"files": {**weights, "buffers": _BUFFERS}, **dict(job.stages())}
    beyond = [0]
    for parts in stages.values():
        if budget is not None and parts.get(STATES, 0) > budget:
            beyond.append(parts.pop(STATES))
    files = job.files()
    files[STATES] += max(beyond)
    on_device: dict[str, Parts] = {name: {} for name in stages}
    if device != "cpu":
        on_device, stages = stages, {
            name: _on_host(parts, sizes, streamed) for name, parts in stages.items()
        }  # fmt: skip
    stage = _largest(stages if device == "cpu" else on_device)
    host = stages[_largest(stages)] | {OTHER: _LIBRARIES}
    return Forecast(
        streamed, at_once, stage, {part: size for part, size in host.items() if size},
        {part: size for part, size in on_device[stage].items() if size},
        {part: size for part, size in files.items() if size}, shared.processes, job.reads(),
    )  # fmt: skip


def running_bytes(
    reader: CheckpointReader, config: Any, item: int, *, tokens: int, sequences: int
) -> int:
    """Return what a model that runs holds besides its weights and its cache.

    The stream before and behind a layer, what the widest layer computes in between, and the logits
    of one position of every sequence, once in the model's dtype and once in float32.

    Args:
        item: bytes of a number.
        tokens: of one pass.
    """
    sizes = _Sizes.of(reader, config, item)
    inside = 2 * sizes.state(tokens) + tokens * sizes.width * item
    return inside + sequences * sizes.vocabulary * (item + 4)


def _largest(stages: Mapping[str, Parts]) -> str:
    return max(stages, key=lambda name: sum(stages[name].values()))


def _on_host(parts: Parts, sizes: _Sizes, streamed: bool) -> Parts:
    """Move what an accelerator does not hold out of ``parts``; return what its host holds."""
    # Weights are loaded there first, and what is trained is copied there for a checkpoint.
    host = {
        "weights": 0 if streamed or HOSTED in parts else sizes.total * sizes.item,
        "copies for checkpoints": parts.pop(BEST, 0) // _TRAINED[BEST] * _CHECKPOINT,
        "buffers": parts.pop("buffers", 0),
        STATES: parts.pop(STATES, 0),
        HOSTED: parts.pop(HOSTED, 0),
    }
    if streamed:  # one layer computes, the next one is read
        parts[LAYER] = 2 * parts.get(LAYER, 0)
        host |= {"the next layer": sizes.layer * sizes.item}
    return host


def _computes(recipe: Recipe) -> bool:
    """Whether a recipe runs the model at all; else any family will do, and weights are copied."""
    looked_at = get_method(recipe.method).looked_at(recipe)
    return looked_at is not None or recipe.replacement.kind != "none" or recipe.recovery is not None


def trained(recipe: Recipe) -> TrainingSpec | None:
    """Return how a recipe trains; None where it does not."""
    if recipe.recovery is not None:
        return recipe.recovery.training
    kind = recipe.replacement.kind
    return None if kind == "none" or recipe.training.objective == "none" else recipe.training


def through_model(recipe: Recipe) -> bool:
    """Whether a recipe trains through the whole model, which processes can divide."""
    spec = trained(recipe)
    return recipe.recovery is not None or (spec is not None and spec.objective not in STATE_ERRORS)


def _tokens_of(spec: CalibrationSpec, config: Any) -> tuple[int, int]:
    """Return (tokens, tokens of one sequence)."""
    length = spec.length_within(sequence_limit(config))
    if spec.tokens is not None:
        return spec.tokens, min(length, spec.tokens)
    return (spec.samples or _SEQUENCES) * length, length


def _found_tokens(spec: CalibrationSpec, config: Any, folder: Path) -> int:
    """Return the most tokens that a text gives: as many as are asked for, if it is long enough.

    A token is of one byte or more, so that a small file gives fewer than a recipe's many samples.
    """
    tokens, length = _tokens_of(spec, config)
    paths = local_paths(spec.source, folder)
    # Of what is packed otherwise, or cut into sequences that are filled up, the size says less.
    plain = [path for path in paths if path.is_file() and not file_kind(path.stem)]
    if spec.form != "packed" or not paths or len(plain) < len(paths):
        return tokens
    if any(file_kind(path) not in ("text", "json", "csv", "tsv") for path in paths):
        return tokens
    size = sum(path.stat().st_size for path in paths)
    # A token may stand before each sequence.
    return min(tokens, size + size // max(1, length - 1) + length)


@dataclass(frozen=True)
class _Job:
    sizes: _Sizes
    recipe: Recipe
    config: Any
    streamed: bool
    at_once: int
    division: Division
    folder: Path

    @property
    def batch(self) -> int:
        """Sequences that a process computes together."""
        training = trained(self.recipe)
        whole = self.at_once if training is None else training.batch_size
        return min(self.at_once, ceil(whole / self.division.processes))

    def stages(self) -> Iterator[tuple[str, Parts]]:
        """Yield what each stage holds, by the stage's name."""
        method = get_method(self.recipe.method)
        if method.looked_at(self.recipe) is not None:
            used = map(get_method, method.uses(self.recipe.parameters))
            for kind in sorted(method.passes.union(*(other.passes for other in used))):
                yield f"calibration ({kind})", getattr(self, f"_{kind}")()
        if self.recipe.replacement.kind != "none" and "replacement" in method.reads:
            yield from self._replacement()
        recovery = self.recipe.recovery
        if recovery is not None:
            yield from self._recovery()
            if recovery.training.objective == "kd":
                data = self.recipe.recovery_data or recovery.training.data
                yield LOGITS, self._weights(head=True) | self._dense_logits(data)

    def _weights(self, *, head: bool = False) -> Parts:
        """Weights of the model as it is placed.

        Args:
            head: the LM head runs too, with the layers gone.
        """
        sizes = self.sizes
        if not self.streamed:
            return {"weights": sizes.total * sizes.item}
        layer = max(sizes.layer, sizes.head) if head else sizes.layer
        return {"embeddings": sizes.outside * sizes.item, LAYER: layer * sizes.item}

    def _calibration(self, boundaries: int, batch: int) -> Parts:
        """Hidden states of the calibration tokens, and those of one batch at every boundary."""
        sizes = self.sizes
        tokens, length = _tokens_of(self._text, self.config)
        kept = boundaries if self.streamed else 0
        at_hand = (sizes.depth + 1) * sizes.state(batch * length)
        at_hand += batch * length * sizes.width * sizes.item
        return {STATES: kept * sizes.state(tokens), "activations": at_hand}

    @property
    def _text(self) -> CalibrationSpec:
        looked_at = get_method(self.recipe.method).looked_at(self.recipe)
        return self.recipe.calibration if looked_at is None else looked_at

    @property
    def _per_pass(self) -> int:
        return int(self.recipe.parameters.get("batch_size", 1))

    def _states(self) -> Parts:
        return self._weights() | self._calibration(self.sizes.depth + 2, self._per_pass)

    def _maps(self) -> Parts:
        square = _SQUARE * self.sizes.hidden**2 * int(self.recipe.parameters.get("blocks", 1))
        return self._states() | {"sums of products": square}

    def _losses(self) -> Parts:
        sizes = self.sizes
        tokens, length = _tokens_of(self._text, self.config)
        sequence = length * ((sizes.depth + 1) * sizes.hidden + 3 * sizes.vocabulary)
        limit = float(self.recipe.parameters.get("activations_gb", 8.0)) * 1e9
        batch = int(min(8, ceil(tokens / length), limit // (sequence * max(sizes.item, 4)))) or 1
        logits = length * sizes.vocabulary * (batch * sizes.item + 8)
        found = self._weights(head=True) | self._calibration(sizes.depth, batch)
        if self.streamed:  # of one boundary at a time
            found["activations"] = batch * length * sizes.width * sizes.item
        return found | {"logits": logits}

    def _merges(self) -> Parts:
        sizes = self.sizes
        tokens, _ = _tokens_of(self._text, self.config)
        states = (sizes.depth + 2) * sizes.state(tokens)
        return self._weights() | {STATES: states}

    def _gradients(self) -> Parts:
        sizes = self.sizes
        tokens, length = _tokens_of(self._text, self.config)
        found = self._weights(head=True) | self._calibration(sizes.depth + 2, 1)
        states = (sizes.depth + 2) * sizes.state(tokens)
        by_layer = self.streamed or states < 4 * sizes.depth * sizes.layer
        layers = 1 if by_layer else sizes.depth
        return found | {
            STATES: states if by_layer else 0,
            "gradients": sizes.layer * (4 * layers + sizes.item),
            "activations": layers * length * sizes.width * sizes.item,
            "logits": length * sizes.vocabulary * (sizes.item + _LOSS_BYTES),
        }

    def _axes(self) -> Parts:
        sizes = self.sizes
        tokens, _ = _tokens_of(self._text, self.config)
        found = self._weights() | self._calibration(0, self._per_pass)
        return found | {
            STATES: sizes.state(tokens),
            "covariances": _SQUARE * sizes.hidden**2,
            "rows that are turned": 2 * 8 * min(WIDENED_ROWS, sizes.vocabulary) * sizes.hidden,
        }

    def _replacement(self) -> Iterator[tuple[str, Parts]]:
        sizes, recipe, spec = self.sizes, self.recipe, self.recipe.training
        layered = recipe.replacement.kind == "layer"
        count = recipe.replacement.layers * sizes.layer if layered else 0
        count = count or network_parameters(recipe.replacement, self.config)
        if spec.objective not in STATE_ERRORS:  # which train one after the other
            count *= self._cuts
        if spec.objective == "none":
            yield "replacement", self._weights() | {"weights of the replacement": 4 * count}
            return
        tokens, length = _tokens_of(spec.data, self.config)
        at_hand = self.batch * length
        parts = {name: count * size for name, size in _TRAINED.items()}
        if spec.objective not in STATE_ERRORS:
            parts = self._shares(count)
            if spec.objective == "kd":
                yield LOGITS, self._weights(head=True) | self._dense_logits(spec.data)
            passing = {
                "activations": self._activations(spec, sizes.depth, at_hand),
                "logits": self._trained_logits(at_hand),
            }
            if spec.gradient_accumulation == 1 and self.at_once == spec.batch_size:
                # Gradients come when what they are computed from has gone.
                gradients = {"gradients": parts.pop("gradients")}
                passing = max(gradients, passing, key=lambda each: sum(each.values()))
            yield from self._divided(sizes.total, sizes.item)
            yield "training", self._frozen(sizes.total, sizes.item) | parts | passing
            return
        # Values that are kept for the backward pass, and their gradients, in float32.
        width = max(count // sizes.hidden, sizes.hidden)
        parts["activations"] = 2 * 4 * at_hand * min(width, _WIDEST * sizes.hidden)
        states = int(min(3 * sizes.state(tokens), 1.5e9 * spec.cache_gb)) if self.streamed else 0
        weights = self._weights()
        held = {name: size for name, size in weights.items() if name != LAYER}
        yield "training", held | parts | {STATES: states}
        first = {"weights of the replacement": 4 * count, STATES: states}
        yield "hidden states of the teacher", weights | first

    def _dense_logits(self, data: CalibrationSpec) -> Parts:
        """What a pass of the teacher holds: logits of its sequences, copies of those of one."""
        sizes = self.sizes
        tokens, length = _tokens_of(data, self.config)
        one = length * sizes.vocabulary
        sequences = max(1, min(LOGITS_AT_ONCE // one, tokens // length))
        return {
            "activations": 2 * sizes.state(sequences * length)
            + sequences * length * sizes.width * sizes.item,
            "logits": one * (sequences * sizes.item + _DISTILLED_BYTES),
        }

    def files(self) -> Parts:
        """Return what lies in the work folder until the result is published."""
        recipe, recovery = self.recipe, self.recipe.recovery
        found = {STATES: 0, LOGITS: 0}
        if recipe.replacement.kind != "none" and "replacement" in get_method(recipe.method).reads:
            found[STATES] = self._kept_states()
            found[LOGITS] = self._kept_logits(recipe.training, recipe.training.data)
        if recovery is not None:
            data = recipe.recovery_data or recovery.training.data
            found[LOGITS] += self._kept_logits(recovery.training, data)
            found["compressed model"] = int(self.sizes.stored * self._kept)
        return found

    def _kept_states(self) -> int:
        """Bytes of the states at both ends of the block that a training keeps for its epochs."""
        spec = self.recipe.training
        if spec.objective not in STATE_ERRORS:
            return 0
        length = _tokens_of(spec.data, self.config)[1]
        tokens = _found_tokens(spec.data, self.config, self.folder)
        per_epoch = ceil(tokens / length / (spec.batch_size * spec.gradient_accumulation))
        size = 2 * self.sizes.state(tokens) * self._cuts
        again = spec.epochs > 1 or spec.min_steps > per_epoch
        return size if again and size <= spec.cache_gb * 1e9 else 0

    def _kept_logits(self, spec: TrainingSpec, data: CalibrationSpec) -> int:
        """Bytes of the largest logits of a training that distils: a value and an id of each."""
        if spec.objective != "kd":
            return 0
        tokens = _found_tokens(data, self.config, self.folder)
        return tokens * (min(spec.kd.top_k, self.sizes.vocabulary) + 1) * 8

    def reads(self) -> tuple[int, int]:
        """Return how often layers are read for a training on hidden states, and bytes of it all."""
        spec, sizes = self.recipe.training, self.sizes
        layered = self.streamed and self.recipe.replacement.kind != "none"
        if not layered or spec.objective not in STATE_ERRORS:
            return 0, 0
        length = _tokens_of(spec.data, self.config)[1]
        tokens, cuts = _found_tokens(spec.data, self.config, self.folder), self._cuts
        own = spec.model_copy(update={"cache_gb": spec.cache_gb / cuts})
        sequences = max(2, ceil(tokens / length))
        times = cuts * times_read(own, sequences, 2 * sizes.state(length), self.at_once)
        layers = min(1.0, sizes.depth * sizes.layer / sizes.total)
        return times, int(times * layers * sizes.stored)

    @property
    def _kept(self) -> float:
        """Share of the parameters that are left before the recovery."""
        if self._removed:
            return 1 - self._removed * self.sizes.layer / self.sizes.total
        return 1 - (self.recipe.sparsity or 0)

    @property
    def _cuts(self) -> int:
        """Replacements that are trained: as many as are listed, else the most there may be."""
        recipe, sizes = self.recipe, self.sizes
        options = get_method(recipe.method).parameters.model_validate(recipe.parameters)
        if not isinstance(options, AnySelection):
            return 1
        if recipe.replacement.kind == "layer":
            return options.most_cuts(sizes.depth, max(1, self._removed), recipe.replacement.layers)
        size, cuts, more = network_parameters(recipe.replacement, self.config), 0, 1
        while more > cuts:  # networks take up parameters, so that more layers are removed
            cuts = more
            added = 0 if recipe.n_layers is not None else ceil(cuts * size / sizes.layer)
            more = options.most_cuts(sizes.depth, max(1, self._removed) + added)
        return cuts

    def _shares(self, count: int) -> Parts:
        """What belongs to so many trained parameters in this process."""
        among = self.division
        parts = {
            name: count * size // (among.weights if name == "trained weights" else among.moments)
            for name, size in _TRAINED.items()
            if name != BEST
        }
        parts[BEST] = count * _TRAINED[BEST]  # all of them, on the host of the main process
        if among.zero:
            parts["DeepSpeed's copies"] = count * _ZERO // among.moments
        return parts

    def _frozen(self, count: int, item: int) -> Parts:
        """What belongs to so many weights that are not trained, in this process.

        Args:
            item: bytes of one, where DeepSpeed does not make it float32.
        """
        sizes, among = self.sizes, self.division
        item = 4 if among.zero else item
        parts = {"weights": count * item // among.weights}
        if among.weights > 1:
            unit = max(sizes.layer, sizes.outside, sizes.head)
            parts["weights that are whole at a time"] = _UNITS * unit * item
        return parts

    def _divided(self, count: int, item: int) -> Iterator[tuple[str, Parts]]:
        """What the host holds of a process before weights go from there to be divided."""
        if self.division.moments > 1:
            yield "loading", {HOSTED: count * (4 if self.division.zero else item)}

    def _recovery(self) -> Iterator[tuple[str, Parts]]:
        sizes, recovery = self.sizes, self.recipe.recovery
        assert recovery is not None
        data = self.recipe.recovery_data or recovery.training.data
        at_hand = self.batch * _tokens_of(data, self.config)[1]
        layers = sizes.depth - self._removed
        total = sizes.total - self._removed * sizes.layer
        frozen, deep, item = total, layers, sizes.item
        if recovery.kind == "lora":
            count = layers * recovery.rank * 2 * (sizes.width + sizes.hidden)
        elif recovery.kind == "partial":
            deep = min(recovery.last_layers, layers)
            count = deep * sizes.layer + (sizes.head or sizes.outside)
            frozen = total - count
            item = 4 if self.division.moments > 1 else item
        else:
            count, frozen, item = total, 0, 4
        yield from self._divided(total, item)
        yield "recovery", {
            **self._frozen(frozen, item), **self._shares(count),
            "activations": self._activations(recovery.training, deep, at_hand),
            "logits": self._trained_logits(at_hand),
        }  # fmt: skip

    def _activations(self, spec: TrainingSpec, layers: int, tokens: int) -> int:
        """Bytes that are kept for the backward pass through so many layers."""
        sizes = self.sizes
        whole = tokens * sizes.width * sizes.item
        return (
            layers * sizes.state(tokens) + whole
            if spec.gradient_checkpointing
            else (layers * whole)
        )

    def _trained_logits(self, positions: int) -> int:
        sizes = self.sizes
        held = positions_at_once(positions, sizes.vocabulary) * sizes.vocabulary
        return held * (sizes.item + _LOSS_BYTES)

    @property
    def _removed(self) -> int:
        """Layers that are gone before the recovery; none where a method removes something else."""
        if get_method(self.recipe.method).removes != "layers":
            return 0
        share, wanted = self.recipe.sparsity, self.recipe.n_layers
        if wanted is None and share is not None:
            return int(share * self.sizes.total / self.sizes.layer)
        return wanted or 0


def as_gb(parts: Mapping[str, int]) -> str:
    """Return parts with their sizes in 10^9 bytes, the largest first."""
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / 1e9:.3g}" for name, size in ordered)
