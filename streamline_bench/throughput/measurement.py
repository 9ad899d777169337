"""Measures models side by side, describes the machine, and writes the record."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from streamline_bench.core.checkpoint.folder import resolve_pretrained
from streamline_bench.core.machine.environment import free_memory, package_versions
from streamline_bench.errors import CheckpointError, OutputError, ThroughputError
from streamline_bench.throughput.blocks import Blocks, measure_blocks
from streamline_bench.throughput.engines import EngineSettings, engine_class
from streamline_bench.throughput.footprint import (
    DTYPE_BYTES,
    cache_bytes,
    footprint,
    resolved_dtype,
)
from streamline_bench.throughput.meters import open_device
from streamline_bench.throughput.record import (
    PAPER_FIGURES,
    Environment,
    Point,
    ThroughputRecord,
    write_record,
)
from streamline_bench.throughput.results import model_result, points_of, widest
from streamline_bench.throughput.sweep import Contender, RunningModel
from streamline_bench.throughput.workload import Setup, Workload

log = logging.getLogger(__name__)


def measure(
    models: Mapping[str, Path | str],
    *,
    dense: str | None = None,
    engine: str = "hf",
    workload: Workload | None = None,
    setup: Setup | None = None,
    mode: Literal["offline", "paper"] = "offline",
    confidence: float = 0.95,
    output: Path | None = None,
    progress: bool = True,
) -> ThroughputRecord:
    """Measure the models in blocks: each starts every model's process anew, in random order.

    In a block, the models take turns round by round. A model that is missing, crashes, hangs or
    runs out of memory becomes a failed row with the reason; the others are still measured.

    Args:
        models: label -> folder or hub name.
        dense: label of the reference for ratios.
        engine: ``hf``, ``vllm``, or ``module:Class`` of an :class:`~.engines.Engine`.
        mode: ``paper``: one sequence at a time, transformers' eager attention, and the paper's
            figures in the record; needs ``engine="hf"``.
        output: folder for ``throughput.json`` and each process's log; None: nothing is kept.

    Raises:
        ThroughputError: an unknown engine or label, or no model at all.
        MissingDependencyError: the engine is not installed.
        OutputError: the record cannot be written.
    """
    workload, setup = workload or Workload(), setup or Setup()
    models, setup, copy = with_copy(models, dense, workload, setup)
    if mode == "paper":
        if engine != "hf":
            raise ThroughputError(f"Paper mode runs engine 'hf', not '{engine}'; leave it out.")
        workload = workload.model_copy(update={"batch_sizes": (1,)})
        setup = setup.model_copy(update={"attention": setup.attention or "eager"})
    engine_class(engine).require()
    compared = Comparison(models, dense, workload, setup)
    with log_folder(output) as logs:
        largest, tokens = max(workload.batch_sizes), workload.sequence_tokens
        running = []
        for index, contender in enumerate(compared.contenders):
            settings, log = compared.settings(contender, largest, tokens), logs / f"{index:02d}.log"
            running.append(RunningModel(contender, engine, settings, setup, log, compared.nvml))
        alone = compared.one_at_a_time(largest, tokens)
        blocks = _measured(running, dense, workload, setup, alone, confidence, progress)
    points = {
        label: points_of(
            found,
            blocks.points[dense] if dense is not None else None,
            setup.resolved_clock,
            confidence=confidence,
            seed=workload.seed,
        )
        for label, found in blocks.points.items()
    }
    return compared.record(
        output,
        points=points,
        engine=engine,
        mode=mode,
        clock=setup.resolved_clock,
        confidence=confidence,
        interleaved=not alone,
        blocks=blocks.done,
        stopped=blocks.stopped,
        self_check=copy,
        paper=PAPER_FIGURES if mode == "paper" else (),
    )


def with_copy(
    models: Mapping[str, Path | str], dense: str | None, workload: Workload, setup: Setup
) -> tuple[Mapping[str, Path | str], Setup, str | None]:
    """Return the models to measure, how, and the label of the copy of the dense one among them.

    The copy runs with the interpreter of the dense one.
    """
    if dense is None and (workload.self_check or workload.until_precision is not None):
        asked = "self_check" if workload.self_check else "until_precision"
        raise ThroughputError(f"'{asked}' is about ratios to a dense model; name it with dense.")
    if dense is None or not workload.self_check:
        if workload.until_precision is not None and len(models) == 1:
            raise ThroughputError(
                f"'until_precision' is about ratios, but '{dense}' is the only model; give another "
                "one, or self_check."
            )
        return models, setup, None
    copy = f"{dense} (again)"
    if copy in models:
        raise ThroughputError(f"The label '{copy}' is that of self_check; rename that model.")
    if dense in setup.pythons:
        pythons = {copy: setup.pythons[dense], **setup.pythons}
        setup = setup.model_copy(update={"pythons": pythons})
    return {**models, **({copy: models[dense]} if dense in models else {})}, setup, copy


class Comparison:
    """The models of one record, and the machine as it was when measuring began.

    Args:
        tokens: what every model must take in one sequence; None: that of the workload.

    Raises:
        ThroughputError: no model, or ``dense`` is not among them.

    Attributes:
        contenders: with the sizes of every model; one that cannot be read is a failed one.
        dtype: in which all of them run.
        nvml: the accelerator's readings; None on a processor or without NVML.
    """

    def __init__(
        self,
        models: Mapping[str, Path | str],
        dense: str | None,
        workload: Workload,
        setup: Setup,
        tokens: int | None = None,
    ) -> None:
        if not models:
            raise ThroughputError("No model was given; name at least one folder.")
        if dense is not None and dense not in models:
            raise ThroughputError(
                f"The dense model '{dense}' is not among the models: {', '.join(models)}."
            )
        needed = workload.sequence_tokens if tokens is None else tokens
        unknown = [label for label in setup.pythons if label not in models]
        if unknown:
            raise ThroughputError(
                f"An interpreter is given for '{unknown[0]}', which is not among the models: "
                f"{', '.join(models)}."
            )
        self.contenders = [_contender(name, str(model), needed) for name, model in models.items()]
        self._sizes = [c.footprint for c in self.contenders if c.footprint is not None]
        self.dtype = resolved_dtype(setup.dtype, [sizes.dtype for sizes in self._sizes])
        self._dense, self._workload, self._setup = dense, workload, setup
        self._load = load_average()
        if setup.on_cpu:
            self.nvml, self._energy = None, "not read: processors report none here"
            self._memory = "resident memory of the process and its children, sampled"
        else:
            self.nvml, self._energy = open_device(str(setup.visible_device))
            self._memory = "NVML, or the peak of torch's allocator for engine hf"

    def settings(self, contender: Contender, sequences: int, tokens: int) -> EngineSettings:
        """Return how one model is loaded, for up to so many sequences of so many tokens."""
        workload, setup = self._workload, self._setup
        tokens = setup.max_model_len or tokens
        kept = self.dtype if setup.kv_cache_dtype == "auto" else setup.kv_cache_dtype
        whole = cache_bytes(self._sizes, sequences, tokens, kept)
        cache = setup.kv_cache_bytes or -(-whole // setup.tensor_parallel)
        return EngineSettings(
            model=str(contender.folder), device=setup.process_device, dtype=self.dtype,
            threads=setup.resolved_threads, max_batch=sequences, sequence_tokens=tokens,
            seed=workload.seed, prefix_caching=workload.prefix_caching, kv_cache_bytes=cache,
            eager=setup.eager, attention=setup.attention, trust_remote_code=setup.trust_remote_code,
            kv_cache_dtype=setup.kv_cache_dtype, tensor_parallel=setup.tensor_parallel,
        )  # fmt: skip

    def one_at_a_time(self, sequences: int, tokens: int) -> bool:
        """Whether each model is ended before the next: as asked, or where they do not fit together.

        What processes hold beside weights and caches is not counted.
        """
        if self._setup.one_at_a_time is not None:
            return self._setup.one_at_a_time
        if self._setup.on_cpu:
            free: int | None = free_memory("cpu")
        else:
            free = self.nvml.free_bytes() if self.nvml is not None else None
        if free is None:  # without a driver that says it
            return False
        split, width = self._setup.tensor_parallel, DTYPE_BYTES[self.dtype]
        needed = 0
        for found in self.contenders:
            if found.footprint is not None and found.failure is None:
                cache = self.settings(found, sequences, tokens).kv_cache_bytes or 0
                needed += found.footprint.parameters * width // split + cache
        if needed > free:
            log.warning(
                "The models are measured one at a time: together they need %.3g GB for weights and "
                "caches, and %.3g GB are free.",
                needed / 1e9, free / 1e9,
            )  # fmt: skip
        return needed > free

    def record(
        self,
        output: Path | None,
        *,
        points: Mapping[str, tuple[Point, ...]] | None = None,
        served: Mapping[str, Mapping[str, Any]] | None = None,
        **fields: Any,
    ) -> ThroughputRecord:
        """Return the record of what was measured, by label; written where ``output`` is given.

        Args:
            served: what a served model has in the record: ``serving``, ``sustained``, ``memory``.

        Raises:
            OutputError: the record cannot be written.
        """
        found = self.contenders
        record = ThroughputRecord(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            dense=self._dense,
            dtype=self.dtype,
            workload=self._workload,
            flags=next((c.loaded.flags for c in found if c.loaded is not None), {}),
            environment=self._environment(),
            models=tuple(
                model_result(
                    contender,
                    workload=self._workload,
                    dtype=self.dtype,
                    on_cpu=self._setup.on_cpu,
                    dense=next((c.footprint for c in found if c.label == self._dense), None),
                    points=(points or {}).get(contender.label, ()),
                    **(served or {}).get(contender.label, {}),
                )
                for contender in found
            ),
            **fields,
        )
        if output is not None:
            write_record(record, output)
        return record

    def _environment(self) -> Environment:
        """Return the record's environment, with the facts from the engines."""
        loaded = [c.loaded for c in self.contenders if c.loaded is not None]
        devices, on_cpu = accelerators(), self._setup.on_cpu
        named = next((entry.device_name for entry in loaded if entry.device_name), None)
        versions = {key: value for entry in loaded for key, value in entry.versions.items()}
        return Environment(
            machine_id=machine_id(), device=self._setup.device,
            device_name=named or (processor_name() if on_cpu else "unknown"),
            driver=devices[0].driver if devices and not on_cpu else None,
            cpu_count=os.cpu_count() or 1, threads=self._setup.resolved_threads,
            engine_version=next((e.engine_version for e in loaded if e.engine_version), None),
            versions={**package_versions(), **versions}, load_average=(self._load, load_average()),
            memory=self._memory, energy=self._energy,
            accelerators=len(self._setup.gpus) or self._setup.tensor_parallel,
        )  # fmt: skip


def _contender(label: str, model: str, tokens: int) -> Contender:
    try:
        folder = resolve_pretrained(model)
        sizes = footprint(folder)
    except CheckpointError as error:
        return Contender(label, model, None, None, failure=str(error))
    contender = Contender(label, model, folder, sizes)
    if sizes.max_tokens is not None and sizes.max_tokens < tokens:
        contender.failure = (
            f"the model takes at most {sizes.max_tokens} tokens, but prompt and output have "
            f"{tokens}; give fewer --prompt-tokens or --output-tokens"
        )
    return contender


@contextmanager
def log_folder(output: Path | None) -> Iterator[Path]:
    """Yield a folder for the processes' logs, without earlier ones; a temporary one by default.

    Raises:
        OutputError: it cannot be written.
    """
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    logs = output / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        for old in logs.glob("[0-9][0-9].log"):  # others may be the user's
            old.unlink()
    except OSError as error:
        raise OutputError(
            f"Output {output} cannot be written ({error.strerror}); give another --output."
        ) from None
    yield logs


def _measured(
    running: list[RunningModel],
    dense: str | None,
    workload: Workload,
    setup: Setup,
    one_at_a_time: bool,
    confidence: float,
    progress: bool,
) -> Blocks:
    from tqdm import tqdm

    log.info("Measuring: %s.", workload.cost(len(running)))
    total = workload.blocks * workload.steps * len(running)
    known = None if workload.until_precision is not None else total
    with tqdm(total=known, desc="measuring", unit="step", disable=not progress) as bar:
        return measure_blocks(
            running,
            workload,
            one_at_a_time=one_at_a_time,
            half_width=lambda found: widest(found, str(dense), setup.resolved_clock, confidence),
            advance=bar.update,
        )


HOST_VARIABLE = "STREAMLINE_BENCH_MACHINE"
"""Replaces the host's name, which changes from run to run in containers."""


class Accelerator(NamedTuple):
    """An NVIDIA device as the driver names it."""

    name: str
    driver: str


def processor_name() -> str:
    """Return the processor's model, as the system names it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


@cache
def accelerators() -> tuple[Accelerator, ...]:
    """Return the NVIDIA devices of this machine, in the driver's order; none without a driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if done.returncode:
        return ()
    parts = (line.rpartition(",") for line in done.stdout.splitlines() if "," in line)
    return tuple(Accelerator(name.strip(), driver.strip()) for name, _, driver in parts)


def machine_id() -> str:
    """Return 16 hex digits, equal where processor, cores, accelerators and host are.

    Speeds of different ids compare only as ratios within a run. The host's name (or
    ``STREAMLINE_BENCH_MACHINE``, if set) enters as a digest only.
    """
    parts = [
        processor_name(),
        str(os.cpu_count()),
        *(device.name for device in accelerators()),
        os.environ.get(HOST_VARIABLE) or platform.node(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def load_average() -> float | None:
    """Return the load average of the last minute, None where the system has none."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None
