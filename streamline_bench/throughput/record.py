"""``throughput.json``: everything that was measured, and on what.

Times are seconds unless a name ends in ``_ms``; sizes are bytes. A value that could not
be measured is null; where the reason is not obvious, the next field gives it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from streamline_bench.core.files import atomic_write_text, read_json, validated
from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.figures import Rate, Ratio, Recorded
from streamline_bench.throughput.load import ServingLoad
from streamline_bench.throughput.served import MemorySplit, ServingPoint, Status, Sustained
from streamline_bench.throughput.workload import Clock, Workload

RECORD_NAME = "throughput.json"
SCHEMA_VERSION = 3


class Round(Recorded):
    """One measured round of one model.

    Attributes:
        block: number of the block, in which every model's process was started anew.
        index: number of the round in its block; rounds of equal block and number, of different
            models, lie side by side.
        seconds: wall time of the whole batch.
        cpu_seconds: processor time of the model's process and its children.
        requests, prompt_tokens, output_tokens: what the engine returned, counted.
        energy_joules: what the device drew, idle draw included; None where it cannot be read.
    """

    block: int = 0
    index: int
    seconds: float
    cpu_seconds: float
    requests: int
    prompt_tokens: int
    output_tokens: int
    energy_joules: float | None = None


class Ideal(Recorded):
    """By how much the model would be faster if only its size counted.

    Attributes:
        ratio: the one to be measured against: of the times that a device with the ridge ``ridge``
            (operations per byte) needs at least for a batch, see :mod:`~.footprint`. It lies
            between the next two.
        bytes: dense bytes moved for a batch (weights that are read, keys and values) / this
            model's. None in records of schema 1.
        flops: dense floating-point operations of a batch / this model's.
        layers: dense decoder layers / this model's.
        weights: dense bytes of stored weights / this model's.
        kind: ``layers`` and ``flops`` in records of schema 1, whose ratio was one of these.
    """

    kind: Literal["roofline", "layers", "flops"]
    ratio: float
    bytes: float | None = None
    flops: float
    layers: float | None
    weights: float
    ridge: float | None = None


class Point(Recorded):
    """One model at one batch size.

    ``output_tokens_per_second`` uses the record's clock; the next two fields use one clock each.
    ``batch_size`` is smaller than ``batch_requested`` where memory ran out (see ``notes``).
    """

    batch_requested: int
    batch_size: int
    status: Status
    reason: str | None = None
    notes: tuple[str, ...] = ()
    rounds: tuple[Round, ...] = ()
    output_tokens_per_second: Rate | None = None
    output_tokens_per_wall_second: float | None = None
    output_tokens_per_cpu_second: float | None = None
    total_tokens_per_second: float | None = None
    requests_per_second: float | None = None
    ratio: Ratio | None = None
    ideal: Ideal | None = None
    peak_memory_bytes: int | None = None
    energy_joules_per_token: float | None = None


class ModelResult(Recorded):
    """One model.

    Attributes:
        model: folder or hub name as it was given.
        status: ``ok`` if at least one point was measured; ``reason`` is the first failure.
        kv_bytes_per_token: keys and values of one token over all layers.
        kv_cache_tokens: tokens that the engine's cache holds; None for engines without a fixed one.
        start_seconds: from starting the process to the loaded model.
        serving: every load it was served at; ``sustained``: the highest that keeps an objective.
        memory: weights, cache and activations of the server.
    """

    label: str
    model: str
    status: Status
    reason: str | None = None
    notes: tuple[str, ...] = ()
    parameters: int | None = None
    layers: int | None = None
    weights_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    kv_cache_tokens: int | None = None
    start_seconds: float | None = None
    points: tuple[Point, ...] = ()
    serving: tuple[ServingPoint, ...] = ()
    sustained: Sustained | None = None
    memory: MemorySplit | None = None


class Environment(Recorded):
    """Where it was measured.

    Attributes:
        machine_id: equal on equal machines (processor, cores, accelerators, host), not reversible.
        device_name: model of the processor or accelerator that ran the models.
        load_average: of one minute, before and after; None where the system has none.
        accelerators: that each model ran on.
        memory: how ``peak_memory_bytes`` was read.
        energy: how energy was read, or why it was not.
    """

    machine_id: str
    device: str
    device_name: str
    driver: str | None
    cpu_count: int
    threads: int
    engine_version: str | None
    versions: dict[str, str]
    load_average: tuple[float | None, float | None] = (None, None)
    accelerators: int = 1
    memory: str
    energy: str


class PaperFigure(Recorded):
    """One row of the paper's table."""

    name: str
    tokens_per_second: float
    ratio: float


_DENSE = 19.87
_ROWS = (
    ("dense", _DENSE),
    ("LLM-Streamline, no replacement or a layer", 25.68),
    ("LLM-Streamline, FFN", 25.88),
    ("SliceGPT", 27.20),
    ("LLM-Pruner", 25.91),
)

PAPER_FIGURES = tuple(
    PaperFigure(name=name, tokens_per_second=speed, ratio=speed / _DENSE) for name, speed in _ROWS
)
"""Output tokens per second of Llama-2-7B at about 25 % sparsity (LLM-Streamline, arXiv 2403.19135).

The paper gives no engine, device or lengths. 19.87 tokens/s for a dense 7 B model looks like
transformers without compilation, one sequence at a time, so paper mode runs that. Only the ratios
to dense compare with another machine.
"""


class ThroughputRecord(Recorded):
    """A whole measurement.

    Attributes:
        dense: label of the reference model; None if none was named.
        dtype: of weights and activations.
        clock: what ``output_tokens_per_second`` and the ratios count against.
        interleaved: the models took turns round by round; else one after the other.
        blocks: those that were measured; in each one, every model's process was started anew.
        stopped: why there are fewer than asked for, or less precision; None if all was reached.
        self_check: label of the copy of the dense model; None without one.
        flags: the engine's settings.
        paper: the paper's figures, in paper mode only.
    """

    schema_version: int = SCHEMA_VERSION
    created: str
    engine: str
    mode: Literal["offline", "paper", "serving"]
    dense: str | None
    dtype: str
    clock: Clock
    confidence: float
    interleaved: bool
    blocks: int = 1
    stopped: str | None = None
    self_check: str | None = None
    workload: Workload
    serving_load: ServingLoad | None = None
    flags: dict[str, Any] = Field(default_factory=dict)
    environment: Environment
    models: tuple[ModelResult, ...] = Field(min_length=1)
    paper: tuple[PaperFigure, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_schema_1(cls, data: Any) -> Any:
        """Read a record of one block, whose ideal was a model's and not a point's."""
        if not isinstance(data, dict) or data.get("schema_version") != 1:
            return data
        workload, models = data.get("workload"), data.get("models")
        if isinstance(workload, dict):
            data = {**data, "workload": {"blocks": 1, **workload}}
        if isinstance(models, list):
            data = {**data, "models": [_with_ideals(model) for model in models]}
        return data

    def model(self, label: str) -> ModelResult | None:
        """Return one model's result, None if it is not in the record."""
        return next((result for result in self.models if result.label == label), None)


def _with_ideals(model: Any) -> Any:
    if not isinstance(model, dict) or not isinstance(model.get("points", []), list):
        return model
    kept = {key: value for key, value in model.items() if key != "ideal"}
    points = [
        {"ideal": model.get("ideal"), **point} if isinstance(point, dict) else point
        for point in model.get("points", [])
    ]
    return {**kept, "points": points}


def write_record(record: ThroughputRecord, folder: Path) -> Path:
    """Write ``throughput.json`` into ``folder`` in one step and return its path.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(folder) / RECORD_NAME
    atomic_write_text(path, record.model_dump_json(indent=2) + "\n")
    return path


def read_record(path: Path, advice: str = "measure again") -> ThroughputRecord:
    """Read a ``throughput.json``, or the one in a folder.

    Args:
        advice: what to do about a file that cannot be used.

    Raises:
        ThroughputError: it is missing, damaged, or of a newer schema.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RECORD_NAME
    return validated(
        ThroughputRecord,
        read_json(path, ThroughputError, advice),
        str(path),
        newest=SCHEMA_VERSION,
        error=ThroughputError,
        advice=advice,
    )
