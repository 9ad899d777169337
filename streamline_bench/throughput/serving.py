"""Serves models with vLLM, in blocks, and sends requests at rising loads.

A block starts the server of every model anew, one after the other in random order, dense among
them. The process of a model runs ``vllm serve``, then ``vllm bench serve`` per load (see
:mod:`.server`); the times of every request are those that this client notes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamline_bench.core.machine.processes import free_port
from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.bench import sending
from streamline_bench.throughput.blocks import repeat_blocks
from streamline_bench.throughput.engines.vllm import VLLMEngine, vllm_environment
from streamline_bench.throughput.load import Level, ServingLoad, read_prompts, require_own_tokens
from streamline_bench.throughput.measurement import Comparison, log, log_folder, with_copy
from streamline_bench.throughput.process import WorkerError
from streamline_bench.throughput.record import ThroughputRecord
from streamline_bench.throughput.search import highest
from streamline_bench.throughput.served import MemorySplit, Probe, ServedPass
from streamline_bench.throughput.server import (
    ServingJob,
    is_port_conflict,
    memory_of,
    require_free,
)
from streamline_bench.throughput.serving_results import (
    Searched,
    Served,
    outrun,
    points_of,
    sustained_of,
    widest,
)
from streamline_bench.throughput.sweep import RunningModel
from streamline_bench.throughput.trace import Trace, read_trace, served_pass
from streamline_bench.throughput.workload import Setup, Workload

_SPARE_TOKENS = 16  # special tokens that the client's prompts get on top
_SLOWEST = 1 / 8  # requests per second
_FASTEST = 4096.0
_AGAIN = 1.25  # how much wider a bracket gets around what an earlier block found
_ATTEMPTS = 3


def serve(
    models: Mapping[str, Path | str],
    *,
    dense: str | None = None,
    workload: Workload | None = None,
    load: ServingLoad | None = None,
    setup: Setup | None = None,
    port: int | None = None,
    confidence: float = 0.95,
    output: Path | None = None,
    progress: bool = True,
) -> ThroughputRecord:
    """Serve each model with vLLM and measure its latencies at every load, block after block.

    Of the workload, lengths, seed, prefix caching and all about blocks count. Servers run one after
    the other; each model needs its tokenizer, because the client's prompts are text. A server that
    dies or never gets ready, or a client that fails, becomes a failed row with the reason.

    Args:
        models: label -> folder or hub name.
        dense: label of the reference.
        port: of the servers; None: a free one each time, another if it is taken meanwhile.
        output: folder for ``throughput.json`` and the servers' logs; None: nothing is kept.

    Raises:
        ThroughputError: no model, an unknown label, ``port`` is taken, or the file of prompts
            cannot be used.
        MissingDependencyError: vLLM is not installed.
        OutputError: the record cannot be written.
    """
    from tqdm import tqdm

    workload, load, setup = workload or Workload(), load or ServingLoad(), setup or Setup()
    require_own_tokens(load, workload.prompt_tokens)
    prompts = read_prompts(load, workload.output_tokens)
    VLLMEngine.require()
    if port is not None:
        require_free(port)
    models, setup, copy = with_copy(models, dense, workload, setup)
    least = workload.sequence_tokens if prompts is None else 1
    compared = Comparison(models, dense, workload, setup, least)
    longest = workload.sequence_tokens if prompts is None else prompts.tokens
    limits = [c.footprint.max_tokens for c in compared.contenders if c.footprint]
    tokens = min(filter(None, [longest + _SPARE_TOKENS, *limits]))
    with log_folder(output) as logs:
        servers = [
            Server(
                contender, "vllm", compared.settings(contender, load.most, tokens), setup,
                logs / f"{index:02d}.log", port=port, load=load, workload=workload,
            )
            for index, contender in enumerate(compared.contenders)
        ]  # fmt: skip
        log.info("Serving: %s.", _cost(load, workload, len(servers)))
        with tqdm(desc="serving", unit="step", disable=not progress) as bar:
            done, stopped = _blocks(servers, dense, workload, confidence, bar.update)
    return compared.record(
        output,
        served=_results(servers, dense, load, workload, confidence),
        engine="vllm",
        mode="serving",
        clock="wall",
        confidence=confidence,
        interleaved=False,
        blocks=done,
        stopped=stopped,
        self_check=copy,
        serving_load=load,
    )


def _cost(load: ServingLoad, workload: Workload, models: int) -> str:
    more = "at least " if workload.until_precision is not None else ""
    starts = workload.blocks * models
    what = f"{starts * len(load.levels)} runs of the client" if load.levels else ""
    search = f"{starts} searches of about 6 to 10 runs each" if load.slo is not None else ""
    end = "" if workload.minutes is None else f", at most about {workload.minutes:g} minutes"
    runs = " and ".join(filter(None, [what, search]))
    return (
        f"{more}{workload.blocks} blocks x {models} models: {starts} starts of a server, {runs}"
        f"{end}"
    )


def _blocks(
    servers: list[Server],
    dense: str | None,
    workload: Workload,
    confidence: float,
    advance: Callable[[], object],
) -> tuple[int, str | None]:
    def block(number: int) -> None:
        shown = [server for server in servers if number == 0 or server.contender.alive]
        random.Random(f"{workload.seed} {number}").shuffle(shown)
        for server in shown:
            server.block(number, advance)

    def half_width() -> float:
        reference = _of(servers, dense)
        others = [server for server in servers if server is not reference]
        if reference is None:
            return 0.0
        pairs = [
            pair for server in others for pair in zip(server.served, reference.served, strict=True)
        ]
        searched = [(server.searched, reference.searched) for server in others]
        return widest(pairs, searched if servers[0].load.slo else [], confidence)

    return repeat_blocks(
        block,
        workload,
        half_width=half_width,
        alive=lambda: any(server.contender.alive for server in servers),
    )


def _of(servers: list[Server], label: str | None) -> Server | None:
    return next((server for server in servers if server.contender.label == label), None)


def _results(
    servers: list[Server],
    dense: str | None,
    load: ServingLoad,
    workload: Workload,
    confidence: float,
) -> dict[str, dict[str, Any]]:
    """Return what each model has in the record."""
    reference = _of(servers, dense)
    how: dict[str, Any] = {"confidence": confidence, "seed": workload.seed}
    found: dict[str, dict[str, Any]] = {}
    for server in servers:
        peer = reference if reference is not server else None
        theirs = (peer.served, peer.searched) if peer is not None else (None, None)
        found[server.contender.label] = {
            "serving": points_of(server.served, theirs[0], load, **how),
            "sustained": sustained_of(server.searched, theirs[1], load, **how)
            if load.slo is not None
            else None,
            "memory": server.memory,
        }
    return found


@dataclass
class Server(RunningModel):
    """One model's server, started anew in every block, and the requests sent to it."""

    job = f"{ServingJob.__module__}:{ServingJob.__name__}"
    doing = "starting the server"

    port: int | None = None
    load: ServingLoad = field(default_factory=ServingLoad)
    workload: Workload = field(default_factory=Workload)
    memory: MemorySplit | None = None
    attempts: int = _ATTEMPTS
    _log_from: int = 0

    def __post_init__(self) -> None:
        self.served = [Served(level) for level in self.load.levels]
        self.searched = Searched()

    def environment(self) -> Mapping[str, str]:
        self._log_from = self.log.stat().st_size if self.log.exists() else 0
        # The server says at this level what its memory goes to.
        return {**vllm_environment(self.settings, in_process=False), "VLLM_LOGGING_LEVEL": "INFO"}

    def arguments(self) -> dict[str, Any]:
        return {"port": self.port or free_port()}

    def may_retry(self, failure: WorkerError) -> bool:
        """Whether to start again: on another port, where the free one was taken meanwhile."""
        self.attempts -= 1
        if failure.out_of_memory:
            failure.reason += (
                f"; it was to hold {self.settings.max_batch} sequences of "
                f"{self.settings.sequence_tokens} tokens: give less --concurrency or "
                "--max-concurrency, or less --kv-cache-gib"
            )
        return self.port is None and self.attempts > 0 and is_port_conflict(self._printed())

    def _printed(self) -> str:
        """What the latest server has printed."""
        return self.log.read_bytes()[self._log_from :].decode("utf-8", "replace")

    def block(self, number: int, advance: Callable[[], object]) -> None:
        """Start the server, measure every load, search the highest one, and end the server.

        After a failure the rest fails with its reason.
        """
        self.attempts = _ATTEMPTS
        self.start()
        advance()
        try:
            if self.contender.alive and self.memory is None:
                self.memory = memory_of(self._printed())
            for index, served in enumerate(self.served):
                self._measure(served, number, index)
                advance()
            if self.load.slo is not None:
                self._search(number, advance)
        finally:
            self.close()

    def _measure(self, served: Served, block: int, index: int) -> None:
        if self.contender.alive:
            try:
                trace, found = self._send(served.level, block, index)
            except WorkerError as failure:
                self.contender.failure = failure.reason
            else:
                served.traces.append(trace)
                served.passes.append(found)
        served.reason = self.contender.failure

    def _send(self, level: Level, block: int, index: int) -> tuple[Trace, ServedPass]:
        """Run the client once.

        Raises:
            WorkerError: the server or the client failed; the process is gone.
        """
        assert self._process is not None
        seed = self.workload.seed + 1000 * block + index
        asked = sending(self.load, self.workload, level, seed)
        doing = f"serving {level.described}"
        try:
            answer = self._process.ask("bench", doing, self.setup.timeout, asked=asked.model_dump())
            trace = read_trace(answer, asked.warmup)
        except ThroughputError as error:
            raise WorkerError(f"{error} (while {doing})") from None
        found = served_pass(trace, level, block, self.load.slo)
        own = answer["request_goodput"]
        return trace, found.model_copy(update={"client_goodput": own})

    def _search(self, block: int, advance: Callable[[], object]) -> None:
        """Find the highest load of this block that keeps the objective."""
        searched, slo = self.searched, self.load.slo
        assert slo is not None
        tried: dict[float, tuple[ServedPass, str]] = {}

        def holds(load: float) -> bool:
            level = self._level(load)
            trace, found = self._send(level, block, 500 + len(tried))
            piled = outrun([found])
            good = found.good or 0.0
            keeps = good >= slo.p / 100 and piled is None
            broke = "saturated" if piled else trace.broken(slo)
            tried[load] = found, broke
            probe = Probe(
                block=block, level=load, holds=keeps, good=good, broke=None if keeps else broke
            )
            searched.probes.append(probe)
            advance()
            return keeps

        if self.contender.alive:
            try:
                best, above = highest(holds, **self._bracket(block))
            except WorkerError as failure:
                self.contender.failure = failure.reason
            else:
                searched.levels[block] = best
                searched.limits[block] = (
                    "the most that is tried" if above is None else tried[above][1]
                )
                if best:
                    searched.passes[block] = tried[best][0]
        searched.reason = self.contender.failure

    def _level(self, load: float) -> Level:
        if self.load.search == "concurrency":
            return Level(float("inf"), round(load))
        return Level(load, self.load.max_concurrency)

    def _bracket(self, block: int) -> dict[str, Any]:
        """Where a search begins: near what earlier blocks found."""
        known = [level for level in self.searched.levels.values() if level]
        whole = self.load.search == "concurrency"
        bounds = (1.0, float(self.load.most)) if whole else (_SLOWEST, _FASTEST)
        start = max(1.0, sum(known) / len(known)) if known else 1.0
        factor = _AGAIN if known else 2.0
        return {"start": start, "least": bounds[0], "most": bounds[1], "whole": whole,
                "factor": factor}  # fmt: skip
