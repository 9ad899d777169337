"""What the process of a model does when it is served: ``vllm serve``, then ``vllm bench serve``.

Server and client are children of this process and in its group, so that nothing of them outlives
it. Both come with vLLM; the figures are those that its own benchmark reports.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.engines import EngineSettings
from streamline_bench.throughput.engines.vllm import memory_flags, require_platform, vllm_version
from streamline_bench.throughput.record import Latency, ServingPoint

JOB = f"{__name__}:ServingJob"
_SERVED_NAME = "model"

HOST = "127.0.0.1"
_POLL_SECONDS = 0.5
_WARM_UPS = 2
_VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
_METRICS = ("ttft", "tpot", "itl", "e2el")


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
        while not self._answers():
            code = self._server.poll()
            if code is not None:
                raise ThroughputError(f"vllm serve ended with exit code {code}")
            time.sleep(_POLL_SECONDS)
        return {
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

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self._port}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _cache_tokens(self) -> int | None:
        """Blocks times tokens per block, from the server's own metrics."""
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self._port}/metrics", timeout=5) as reply:
                text = reply.read().decode("utf-8", "replace")
        except (urllib.error.URLError, OSError):
            return None
        line = next((row for row in text.splitlines() if row.startswith("vllm:cache_config")), "")
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
        name: Latency(
            mean=found[f"mean_{name}_ms"],
            p50=found[f"p50_{name}_ms"],
            p90=found[f"p90_{name}_ms"],
            p99=found[f"p99_{name}_ms"],
        )
        for name in _METRICS
    }
    return ServingPoint(
        request_rate=rate,
        status="ok",
        completed=found["completed"],
        seconds=found["duration"],
        requests_per_second=found["request_throughput"],
        output_tokens_per_second=found["output_throughput"],
        total_tokens_per_second=found["total_token_throughput"],
        **latencies,
    )
