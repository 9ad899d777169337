"""What a model must fit: bytes, memory with its users' sequences, measured latency.

A target is solved to the largest size of a method that keeps all of its limits. Memory is

    weights + sequences x ceil(context / 16) x 16 x numbers cached for a token x bytes of one
    + what one pass holds (:func:`.forecast.running_bytes`)

with keys and values in the dtype of the config, in blocks of 16 tokens as vLLM has them, every
layer with attention caching the whole context (a sliding window caches less), and a pass of up to
8,192 tokens. What a pass holds is that of the dense model. Latencies are interpolated between the
sizes that were measured, for depth by the number of layers, else by parameters among results of
the same method, and never beyond the smallest.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from streamline_bench.compression.forecast import running_bytes
from streamline_bench.compression.recipes import SIZE_KEYS, load_recipe
from streamline_bench.core.architecture import config_entry
from streamline_bench.core.checkpoint.folder import Manifest, read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.recipe.schema import Frozen, Recipe
from streamline_bench.core.recipe.validation import wrong_value
from streamline_bench.core.surgery import cached_values
from streamline_bench.errors import CheckpointError, RecipeError, SparsityError, ThroughputError
from streamline_bench.methods.base import Compression, Size, get_method
from streamline_bench.methods.tools.sizes import Stored
from streamline_bench.modeling.loading import SourceModel
from streamline_bench.throughput.footprint import DTYPE_BYTES
from streamline_bench.throughput.latency import Measured, Metric, interpolated, latencies, load_of
from streamline_bench.throughput.record import read_record

log = logging.getLogger(__name__)

_BLOCK = 16
_PASS_TOKENS = 8192
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_EXAMPLE = "memory=24GiB,concurrency=32,context=4096, bytes=10GB or latency=20ms"


class Target(Frozen):
    """Limits that a model must keep, all of them.

    Attributes:
        bytes: of its weights, as they are stored.
        memory: bytes of weights, cache and one pass, for ``concurrency`` sequences of ``context``
            tokens.
        latency, ttft: seconds per output token and to the first one, as they were measured.
        concurrency: sequences at once; for latencies, the load at which they were measured.
        context: tokens of each sequence.
        measured: ``throughput.json`` or its folder, or a run folder; None: the run's own.
    """

    bytes: int | None = Field(None, gt=0)
    memory: int | None = Field(None, gt=0)
    latency: float | None = Field(None, gt=0)
    ttft: float | None = Field(None, gt=0)
    concurrency: int | None = Field(None, ge=1)
    context: int | None = Field(None, ge=1)
    measured: str | None = None

    @field_validator("bytes", "memory", mode="before")
    @classmethod
    def _sized(cls, value: Any) -> Any:
        number = r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?i?b?)\s*"
        found = re.fullmatch(number, str(value), re.IGNORECASE)
        unit = found[2].lower() if found else "?"
        if found is None or unit not in _UNITS:
            raise ValueError("give bytes such as 24GiB or 900MB")
        return int(float(found[1]) * _UNITS[unit])

    @field_validator("latency", "ttft", mode="before")
    @classmethod
    def _timed(cls, value: Any) -> Any:
        if isinstance(value, float):  # seconds, as they are kept
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(us|ms|s)\s*", str(value))
        if found is None:
            raise ValueError("give a time such as 20ms or 0.5s")
        return float(found[1]) * _SECONDS[found[2]]

    @model_validator(mode="after")
    def _complete(self) -> Target:
        if not self.limits:
            raise ValueError(f"it has no limit; give {_EXAMPLE}")
        if self.memory is not None and not (self.concurrency and self.context):
            raise ValueError("memory needs concurrency=N and context=TOKENS: what is cached counts")
        if self.context is not None and self.memory is None:
            raise ValueError("context has no effect without memory")
        timed = self.latency is not None or self.ttft is not None
        if self.measured is not None and not timed:
            raise ValueError("measured has no effect without latency or ttft")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """Limit by name."""
        found = {name: getattr(self, name) for name in ("bytes", "memory", "latency", "ttft")}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def described(self) -> str:
        """In words: ``at most 24 GiB of memory for 32 sequences of 4,096 tokens``."""
        words = [f"at most {shown(name, value)}" for name, value in self.limits.items()]
        load = (
            f" for {self.concurrency} sequences of {self.context:,} tokens" if self.context else ""
        )
        return " and ".join(words) + load

    @classmethod
    def parse(cls, given: str | Mapping[str, Any], origin: str = "--target") -> Target:
        """Read ``memory=24GiB,concurrency=32,context=4096``, or the same as a mapping.

        Raises:
            RecipeError: naming what is wrong.
        """
        payload: dict[str, Any] = {}
        for part in given.split(",") if isinstance(given, str) else ():
            key, equals, value = part.partition("=")
            if not equals or not key.strip():
                raise RecipeError(f"{origin}: '{part}' is not KEY=VALUE; write {_EXAMPLE}.")
            payload[key.strip()] = value.strip()
        try:
            return cls.model_validate(payload if isinstance(given, str) else dict(given))
        except ValidationError as error:
            raise RecipeError(f"{origin}: {wrong_value(error, cls)}") from None


def shown(name: str, value: float) -> str:
    """Return a value of a limit in words."""
    if name in ("latency", "ttft"):
        per = " per output token" if name == "latency" else " to the first token"
        return f"{1000 * value:.4g} ms{per}"
    unit, word = (2**30, "GiB") if value >= 2**30 else (2**20, "MiB")
    return f"{value / unit:.4g} {word} of {'weights' if name == 'bytes' else 'memory'}"


def serving_memory(reader: CheckpointReader, config: Any, target: Target) -> ServingMemory:
    """Return how a model's memory follows from its size, for the sequences of a target.

    Raises:
        SparsityError: what the model caches, or in which dtype it runs, is not known.
    """
    kind = str(config_entry(config, "dtype") or config_entry(config, "torch_dtype") or "float32")
    item = DTYPE_BYTES.get(kind.removeprefix("torch."))
    if item is None or not cached_values(reader):
        why = f"its config names dtype {kind}" if item is None else (
            "what it caches for a token is not known"
        )  # fmt: skip
        raise SparsityError(f"The memory of {reader.folder} is not known: {why}; give bytes=….")
    sequences, context = target.concurrency or 1, target.context or 1
    tokens = min(sequences * context, max(_PASS_TOKENS, sequences))
    running = running_bytes(reader, config, item, tokens=tokens, sequences=sequences)
    return ServingMemory(-(-context // _BLOCK) * _BLOCK * sequences, item, running)


@dataclass(frozen=True)
class ServingMemory:
    """Memory of a model and its compressions.

    Attributes:
        tokens: that the cache holds.
        item: bytes of a number in it.
        running: bytes that one pass of the dense model holds.
    """

    tokens: int
    item: int
    running: int

    def of(self, nbytes: int, cached: int) -> int:
        """Return the bytes for weights of so many bytes, with so many numbers cached a token."""
        return nbytes + self.tokens * self.item * cached + self.running


def solved(
    name: str,
    given: Mapping[str, Any],
    target: Target,
    source: SourceModel,
    *,
    run: Path | None = None,
) -> tuple[Recipe, Size]:
    """Return a recipe with the largest size that keeps a target, and that size.

    The recipe is the one that the size itself would give, so that its key in the cache is, too.

    Args:
        name: of the recipe, or its path.
        given: the other overrides.
        run: folder whose measurements count where the target names none.

    Raises:
        SparsityError: the model itself keeps the target, or no size of the method does.
        ThroughputError: latencies were not measured.
        StreamlineBenchError: what the method says of this model.
    """
    recipe = load_recipe(name, given)
    solver = Solver(recipe, target, source, run)
    size = solver.largest()
    now = load_recipe(name, {**given, **size.given})
    values = solver.values(size)
    asked = ", ".join(f"{key} {value}" for key, value in size.given.items())
    reached = ", ".join(shown(limit, value) for limit, value in values.items())
    log.info("%s, %s: %s reaches %s", recipe.name, target.described, asked, reached)
    return now, size


class Solver:
    """What the sizes of a recipe's method take, by the limits of a target.

    Raises:
        ThroughputError: latencies were not measured.
        SparsityError: the model's memory is not known.
    """

    def __init__(
        self, recipe: Recipe, target: Target, source: SourceModel, run: Path | None = None
    ) -> None:
        if recipe.method == "dense":
            raise SparsityError("The recipe 'dense' removes nothing, so that it has no target.")
        self._recipe, self._target, self._source = recipe, target, source
        self._stored = Stored.of(source.reader)
        self._untied = _untied_head(recipe, source.reader)
        self._taken: dict[str, Callable[[Size], float | None]] = {}
        for name in target.limits:
            self._taken[name] = self._measure(name, run)

    def sizes(self) -> list[Size]:
        """Return every size of the method, the largest first."""
        bare = self._recipe.model_copy(
            update={
                "sparsity": None,
                "n_layers": None,
                "parameters": _without_sizes(self._recipe.parameters),
            }
        )
        work = Compression(self._source, bare, Path(), progress=False)
        found = get_method(bare.method).sizes(work)
        return sorted(found, key=lambda size: (-size.parameters, -size.nbytes))

    def values(self, size: Size) -> dict[str, float]:
        """Return what a size takes, by limit; what was not measured is left out."""
        found = {name: taken(size) for name, taken in self._taken.items()}
        return {name: value for name, value in found.items() if value is not None}

    def largest(self) -> Size:
        """Return the largest size that keeps every limit.

        Raises:
            SparsityError: the model itself keeps them, or no size does.
        """
        limits, sizes = self._target.limits, self.sizes()
        whole = self.values(self._stored.less({}, parameters=0))
        if whole.keys() == limits.keys() and self._keeps(whole):
            said = ", ".join(shown(name, value) for name, value in whole.items())
            raise SparsityError(
                f"Nothing has to be removed: {self._source.name} itself takes {said}, and the "
                f"target is {self._target.described}; lower the target, or leave it out."
            )
        values = [self.values(size) for size in sizes]
        for size, found in zip(sizes, values, strict=True):
            if found.keys() == limits.keys() and self._keeps(found):
                return size
        least = {
            name: min(known, default=None)
            for name in limits
            for known in [[found[name] for found in values if name in found]]
        }
        reached = ", ".join(
            shown(name, value) if value is not None else f"no measured size ({name})"
            for name, value in least.items()
        )
        more = "" if not (self._target.latency or self._target.ttft) else (
            ", and what is smaller than the smallest measured model is not guessed"
        )  # fmt: skip
        raise SparsityError(
            f"Recipe '{self._recipe.name}' does not reach {self._target.described}: at its "
            f"smallest it takes {reached}{more}; raise the target, or take another recipe."
        )

    def _keeps(self, values: Mapping[str, float]) -> bool:
        return all(values[name] <= limit for name, limit in self._target.limits.items())

    def _measure(self, name: str, run: Path | None) -> Callable[[Size], float | None]:
        if name == "bytes":
            return lambda size: size.nbytes + self._untied
        if name == "memory":
            memory = serving_memory(self._source.reader, self._source.config, self._target)
            return lambda size: memory.of(size.nbytes + self._untied, size.cached or 0)
        metric: Metric = "ttft" if name == "ttft" else "latency"
        by_layers = get_method(self._recipe.method).removes == "layers"
        points = self._points(metric, run, by_layers)
        return lambda size: interpolated(points, size.layers if by_layers else size.parameters)

    def _points(
        self, metric: Metric, run: Path | None, by_layers: bool
    ) -> list[tuple[float, float]]:
        """Measured (size, seconds) of the dense model and of results of this kind."""
        named = self._target.measured
        place = Path(named).expanduser() if named else run
        found: dict[float, list[float]] = {}
        described = []
        for file in _records(place):
            record = read_record(file)
            described.append(
                f"{record.engine} on {record.environment.device_name}, "
                f"{load_of(record, self._target.concurrency)[1]}"
            )
            for one in latencies(record, metric, self._target.concurrency):
                x = self._place(one, by_layers)
                if x is not None:
                    found.setdefault(x, []).append(one.seconds)
        whole = self._stored
        dense = float(len(whole.layer_bytes) if by_layers else whole.parameters)
        if len(found) < 2 or dense not in found:
            what = "time per output token" if metric == "latency" else "time to the first token"
            kind = "with fewer layers" if by_layers else f"of method '{self._recipe.method}'"
            where = f"in {place}" if place else "and the target names no measured=FILE"
            raise ThroughputError(
                f"No {what} of {self._source.name} and of a smaller model {kind} was measured "
                f"{where}; measure some (streamline-bench compare --throughput, or throughput) "
                "before you ask for a latency."
            )
        log.info("%s measured with %s", metric, "; ".join(dict.fromkeys(described)))
        return [(x, sum(values) / len(values)) for x, values in found.items()]

    def _place(self, one: Measured, by_layers: bool) -> float | None:
        """Where a measured model lies among the sizes; None: it is another kind of model."""
        if one.parameters is None or one.layers is None:
            return None
        place = float(one.layers if by_layers else one.parameters)
        manifest = _manifest(one.model)
        if manifest is None or manifest.recipe.get("method") == "dense":
            if one.parameters == self._stored.parameters:
                return place
        elif manifest.source.weights_sha256 != self._source.weights_sha256:
            return None
        stock = get_method(self._recipe.method).stock(self._recipe)
        if by_layers and stock and self._only_fewer_layers(one):
            return place
        return place if manifest is not None and self._same_kind(manifest.recipe) else None

    def _only_fewer_layers(self, one: Measured) -> bool:
        """Whether a model is this one with fewer layers, all alike, and nothing else."""
        layers = self._stored.layer_parameters
        gone = len(layers) - (one.layers or 0)
        same = len(set(layers)) == 1 and gone > 0
        return same and one.parameters == self._stored.parameters - gone * layers[0]

    def _same_kind(self, made: Mapping[str, Any]) -> bool:
        """Whether another recipe differs in its size, data and training alone."""
        own = self._recipe
        return (
            made.get("method") == own.method
            and (made.get("replacement") or {}).get("kind", "none") == own.replacement.kind
            and _without_sizes(made.get("parameters") or {}) == _without_sizes(own.parameters)
        )


def _untied_head(recipe: Recipe, reader: CheckpointReader) -> int:
    """Bytes of the head that a recovery takes out of the embeddings."""
    recovery = recipe.recovery
    untied = recovery is not None and recovery.kind == "partial" and recovery.head == "untied"
    return reader.entry(reader.embeddings_name).nbytes if untied and reader.tied else 0


def _without_sizes(parameters: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {key.partition(".")[2] for key in SIZE_KEYS if key.startswith("parameters.")}
    return {key: value for key, value in parameters.items() if key not in sizes}


def _records(place: Path | None) -> Sequence[Path]:
    """The measurements in a file, in a folder, or in a run folder."""
    if place is None:
        return ()
    if place.is_file():
        return [place]
    found = [place / "throughput.json", *sorted(place.glob("throughput*/throughput.json"))]
    return [file for file in found if file.is_file()]


def _manifest(model: str) -> Manifest | None:
    try:
        folder = Path(model).expanduser()
        return read_manifest(folder) if folder.is_dir() else None
    except (CheckpointError, OSError):
        return None
