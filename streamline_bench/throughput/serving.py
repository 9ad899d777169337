"""Serves one model after the other with vLLM and sends requests at rising rates.

The process of a model runs ``vllm serve``, then ``vllm bench serve`` per rate. Server and client
are children of that process and in its group, so that nothing of them outlives it. Both come with
vLLM; the figures are those that its own benchmark reports.
"""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.engines import EngineSettings
from streamline_bench.throughput.engines.vllm import (
    VLLMEngine,
    memory_flags,
    require_platform,
    vllm_environment,
    vllm_version,
)
from streamline_bench.throughput.measurement import Comparison, log_folder
from streamline_bench.throughput.process import WorkerError
from streamline_bench.throughput.record import Latency, ServingPoint, ThroughputRecord
from streamline_bench.throughput.sweep import RunningModel
from streamline_bench.throughput.workload import ServingLoad, Setup, Workload

_SERVED_NAME = "model"
HOST = "127.0.0.1"
_POLL_SECONDS = 0.5
_WARM_UPS = 2
_VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
_METRICS = ("ttft", "tpot", "itl", "e2el")
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
    compared = Comparison(models, dense, workload, setup)
    contenders = compared.contenders
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
            settings = compared.settings(contender, sequences, longest)
            log = logs / f"{index:02d}.log"
            server = _Server(contender, "vllm", settings, setup, log, port=port)
            served[contender.label] = server.sweep(workload, load, bar.update)
    return compared.record(
        output,
        served=served,
        engine="vllm",
        mode="serving",
        clock="wall",
        confidence=0.95,
        interleaved=False,
        serving_load=load,
    )


@dataclass
class _Server(RunningModel):
    """One model's server, and the requests sent to it."""

    job = f"{__name__}:ServingJob"
    doing = "starting the server"

    port: int | None = None
    attempts: int = 3

    def environment(self) -> Mapping[str, str]:
        return vllm_environment(self.settings, in_process=False)

    def arguments(self) -> dict[str, Any]:
        return {"port": self.port or free_port()}

    def may_retry(self, failure: WorkerError) -> bool:
        """Whether to start again: on another port, where the free one was taken meanwhile."""
        self.attempts -= 1
        printed = self.log.read_text("utf-8", "replace")
        retry = self.port is None and self.attempts > 0 and is_port_conflict(printed)
        if retry:
            self.log.unlink()
        return retry

    def sweep(
        self, workload: Workload, load: ServingLoad, advance: Callable[[], object]
    ) -> tuple[ServingPoint, ...]:
        """Measure every rate; after a failure the rest fails with its reason."""
        self.start()
        advance()
        points = []
        try:
            for rate in load.request_rates:
                points.append(self._at(rate, workload, load))
                advance()
        finally:
            self.close()
        return tuple(points)

    def _at(self, rate: float, workload: Workload, load: ServingLoad) -> ServingPoint:
        if self._process is None or not self.contender.alive:
            return ServingPoint(request_rate=rate, status="failed", reason=self.contender.failure)
        arguments = {
            "prompt_tokens": workload.prompt_tokens,
            "output_tokens": workload.output_tokens,
            "requests": load.requests,
            "max_concurrency": load.max_concurrency,
        }
        doing = f"serving {rate:g} requests per second"
        try:
            found = self._process.ask("bench", doing, self.setup.timeout, rate=rate, load=arguments)
        except WorkerError as failure:
            self.contender.failure = failure.reason
            return ServingPoint(request_rate=rate, status="failed", reason=failure.reason)
        return point_of(rate, found)


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


class ServingJob:
    """Holds one server with one model. All arguments and answers are plain JSON."""

    _server: subprocess.Popen[bytes]
    _port: int
    _settings: EngineSettings

    def load(self, settings: dict[str, Any], port: int) -> dict[str, Any]:
        """Start the server and return once it answers.

        Raises:
            ThroughputError: it ended instead, its log says why; or it runs on another device than
                asked for.
        """
        self._settings = EngineSettings.model_validate(settings)
        self._port = port
        command = server_command(self._settings, port)
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        require_platform(self._settings)  # while it starts: this process imports vLLM for it
        while self._page("health") is None:
            code = self._server.poll()
            if code is not None:
                raise ThroughputError(f"vllm serve ended with exit code {code}")
            time.sleep(_POLL_SECONDS)
        return {
            "vocab_size": 0,
            "engine_version": vllm_version(),
            "kv_cache_tokens": self._cache_tokens(),
            "flags": {"serve": command[len(_VLLM) :]},
        }

    def bench(self, rate: float, load: dict[str, Any]) -> dict[str, Any]:
        """Send requests at one rate and return vLLM's own result.

        Raises:
            ThroughputError: the client failed, or requests of it did.
        """
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            command = bench_command(self._settings, self._port, rate, result, **load)
            done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
            if done.returncode or not result.exists():
                raise ThroughputError(f"vllm bench serve ended with exit code {done.returncode}")
            found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if found.get("failed"):
            raise ThroughputError(f"{found['failed']} of {load['requests']} requests failed")
        return {key: value for key, value in found.items() if isinstance(value, int | float | str)}

    def _page(self, name: str) -> str | None:
        """Return a page of the server; None if it does not answer."""
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self._port}/{name}", timeout=5) as reply:
                return str(reply.read().decode("utf-8", "replace"))
        except OSError:
            return None

    def _cache_tokens(self) -> int | None:
        """Blocks times tokens per block, from the server's own metrics."""
        rows = (self._page("metrics") or "").splitlines()
        line = next((row for row in rows if row.startswith("vllm:cache_config")), "")
        sizes = dict(re.findall(r'(block_size|num_gpu_blocks)="(\d+)"', line))
        return int(sizes["block_size"]) * int(sizes["num_gpu_blocks"]) if len(sizes) == 2 else None


def server_command(settings: EngineSettings, port: int) -> list[str]:
    """Return the command line of the server."""
    eager = settings.on_cpu if settings.eager is None else settings.eager
    memory = [
        part
        for name, value in memory_flags(settings).items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    prefix = "--enable-prefix-caching" if settings.prefix_caching else "--no-enable-prefix-caching"
    return [
        *_VLLM, "serve", settings.model,
        "--host", HOST, "--port", str(port),
        "--served-model-name", _SERVED_NAME,
        "--dtype", settings.dtype,
        "--seed", str(settings.seed),
        "--max-model-len", str(settings.sequence_tokens),
        "--max-num-seqs", str(settings.max_batch),
        *memory,
        *(["--enforce-eager"] if eager else []),
        *(["--trust-remote-code"] if settings.trust_remote_code else []),
        prefix,
    ]  # fmt: skip


def bench_command(
    settings: EngineSettings,
    port: int,
    rate: float,
    result: Path,
    *,
    prompt_tokens: int,
    output_tokens: int,
    requests: int,
    max_concurrency: int | None,
) -> list[str]:
    """Return the command line of the client, which writes ``result``."""
    return [
        *_VLLM, "bench", "serve",
        "--backend", "vllm",
        "--host", HOST, "--port", str(port),
        "--model", _SERVED_NAME, "--tokenizer", settings.model,
        "--dataset-name", "random",
        "--random-input-len", str(prompt_tokens),
        "--random-output-len", str(output_tokens),
        "--ignore-eos",
        "--temperature", "0",
        "--seed", str(settings.seed),
        "--num-warmups", str(_WARM_UPS),
        "--num-prompts", str(requests),
        "--request-rate", "inf" if math.isinf(rate) else str(rate),
        *(["--max-concurrency", str(max_concurrency)] if max_concurrency else []),
        *(["--trust-remote-code"] if settings.trust_remote_code else []),
        "--percentile-metrics", ",".join(_METRICS),
        "--metric-percentiles", "50,90,99",
        "--disable-tqdm",
        "--save-result",
        "--result-dir", str(result.parent), "--result-filename", result.name,
    ]  # fmt: skip


def point_of(rate: float, found: dict[str, Any]) -> ServingPoint:
    """Return the record's form of one result of ``vllm bench serve`` (times in milliseconds)."""
    latencies = {
        name: Latency(**{kind: found[f"{kind}_{name}_ms"] for kind in Latency.model_fields})
        for name in _METRICS
    }
    return ServingPoint(
        request_rate=rate, status="ok", completed=found["completed"], seconds=found["duration"],
        requests_per_second=found["request_throughput"],
        output_tokens_per_second=found["output_throughput"],
        total_tokens_per_second=found["total_token_throughput"], **latencies,
    )  # fmt: skip
