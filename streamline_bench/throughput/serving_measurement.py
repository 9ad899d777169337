"""Serves one model after the other and sends requests at rising rates."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.contender import Contender, process_environment
from streamline_bench.throughput.engines import EngineSettings, Loaded
from streamline_bench.throughput.engines.vllm import VLLMEngine, vllm_environment
from streamline_bench.throughput.environment import Surroundings
from streamline_bench.throughput.footprint import resolved_dtype
from streamline_bench.throughput.measurement import (
    contenders_of,
    engine_settings,
    log_folder,
    recorded,
)
from streamline_bench.throughput.process import ModelProcess, WorkerError
from streamline_bench.throughput.record import ServingPoint, ThroughputRecord
from streamline_bench.throughput.serving import HOST, JOB, point_of
from streamline_bench.throughput.workload import ServingLoad, Setup, Workload

_ATTEMPTS = 3
_MOST_SEQUENCES = 256
_SPARE_TOKENS = 16  # special tokens that the benchmark's prompts get on top


def serve(
    models: Mapping[str, Path | str],
    *,
    dense: str | None = None,
    workload: Workload | None = None,
    load: ServingLoad | None = None,
    setup: Setup | None = None,
    port: int | None = None,
    output: Path | None = None,
    progress: bool = True,
) -> ThroughputRecord:
    """Serve each model with vLLM and measure its latencies at every request rate.

    Of the workload, the lengths, the seed and prefix caching count. Servers run one after the
    other; each model needs its tokenizer, because the benchmark's prompts are text.

    Args:
        models: label -> folder or hub name.
        dense: label of the reference.
        port: of the servers; None: a free one each time, another if it is taken meanwhile.
        output: folder for ``throughput.json`` and the servers' logs; None: nothing is kept.

    Raises:
        ThroughputError: no model, an unknown label, or ``port`` is taken.
        MissingDependencyError: vLLM is not installed.
        OutputError: the record cannot be written.
    """
    from tqdm import tqdm

    workload, load, setup = workload or Workload(), load or ServingLoad(), setup or Setup()
    VLLMEngine.require()
    if port is not None:
        require_free(port)
    contenders = contenders_of(models, dense, workload)
    dtype = resolved_dtype(setup.dtype, [c.footprint.dtype for c in contenders if c.footprint])
    surroundings = Surroundings(setup)
    served: dict[str, tuple[ServingPoint, ...]] = {}
    total = len(contenders) * (1 + len(load.request_rates))
    with (
        log_folder(output) as logs,
        tqdm(total=total, desc="serving", unit="step", disable=not progress) as bar,
    ):
        sequences = min(load.max_concurrency or load.requests, _MOST_SEQUENCES)
        limits = [c.footprint.max_tokens for c in contenders if c.footprint]
        longest = min(filter(None, [workload.sequence_tokens + _SPARE_TOKENS, *limits]))
        for index, contender in enumerate(contenders):
            settings = engine_settings(
                contender, contenders, workload, setup, dtype, sequences, longest
            )
            server = _Server(contender, settings, setup, port, logs / f"{index:02d}.log")
            served[contender.label] = server.sweep(workload, load, bar.update)
    return recorded(
        contenders,
        surroundings,
        output,
        served=served,
        engine="vllm",
        mode="serving",
        dense=dense,
        dtype=dtype,
        clock="wall",
        confidence=0.95,
        interleaved=False,
        workload=workload,
        serving_load=load,
    )


@dataclass
class _Server:
    """One model's server, and the requests sent to it."""

    contender: Contender
    settings: EngineSettings
    setup: Setup
    port: int | None
    log: Path

    def sweep(
        self, workload: Workload, load: ServingLoad, advance: Callable[[], object]
    ) -> tuple[ServingPoint, ...]:
        """Measure every rate; after a failure the rest fails with its reason."""
        process = self._started()
        advance()
        points = []
        try:
            for rate in load.request_rates:
                points.append(self._at(rate, process, workload, load))
                advance()
        finally:
            if process is not None:
                process.close()
        return tuple(points)

    def _at(
        self, rate: float, process: ModelProcess | None, workload: Workload, load: ServingLoad
    ) -> ServingPoint:
        if process is None or not self.contender.alive:
            return ServingPoint(request_rate=rate, status="failed", reason=self.contender.failure)
        arguments = {
            "prompt_tokens": workload.prompt_tokens,
            "output_tokens": workload.output_tokens,
            "requests": load.requests,
            "max_concurrency": load.max_concurrency,
        }
        doing = f"serving {rate:g} requests per second"
        try:
            found = process.ask("bench", doing, self.setup.timeout, rate=rate, load=arguments)
        except WorkerError as failure:
            self.contender.fail(failure.reason)
            return ServingPoint(request_rate=rate, status="failed", reason=failure.reason)
        return point_of(rate, found)

    def _started(self) -> ModelProcess | None:
        """Start the server; where its free port was taken meanwhile, on another one."""
        attempts = _ATTEMPTS if self.port is None else 1
        while attempts and self.contender.alive:
            attempts -= 1
            started = time.perf_counter()
            environment = process_environment(
                vllm_environment(self.settings, in_process=False),
                self.settings,
                self.setup.visible_device,
            )
            process = ModelProcess(JOB, environment, self.log)
            try:
                answer = process.ask(
                    "load",
                    "starting the server",
                    self.setup.start_timeout,
                    settings=self.settings.model_dump(),
                    port=self.port or free_port(),
                )
            except WorkerError as failure:
                if attempts and is_port_conflict(process.log_tail()):
                    self.log.unlink()
                    continue
                self.contender.fail(failure.reason)
                return None
            self.contender.start_seconds = time.perf_counter() - started
            self.contender.loaded = Loaded(vocab_size=0, **answer)
            return process
        return None


def free_port() -> int:
    """Return a port that was free a moment ago; another process may take it at any time."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def require_free(port: int) -> None:
    """Check a port that the user asked for.

    Raises:
        ThroughputError: something listens there, or it may not be used.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ThroughputError(
                f"Port {port} cannot be used ({error.strerror}); give another --port, or none to "
                "have a free one chosen."
            ) from None


def is_port_conflict(text: str) -> bool:
    """Whether a server's log says that its port was taken."""
    return re.search(r"address already in use|errno 98|errno 48", text, re.IGNORECASE) is not None
