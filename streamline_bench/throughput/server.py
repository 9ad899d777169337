"""The process of one served model: ``vllm serve``, and ``vllm bench serve`` against it.

Server and client are children of that process and in its group, so that nothing of them outlives
it. Both come with vLLM.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from streamline_bench.core.machine.processes import HOST
from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.bench import SERVED_NAME, VLLM, Sending, bench_command
from streamline_bench.throughput.engines import EngineSettings
from streamline_bench.throughput.engines.vllm import (
    memory_flags,
    parallel_flags,
    require_platform,
    vllm_version,
)
from streamline_bench.throughput.served import MemorySplit
from streamline_bench.throughput.trace import TRACED

_POLL_SECONDS = 0.2
_JUMP_SECONDS = 0.2
_GIB = 1 << 30


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
            self._require_server()
            time.sleep(_POLL_SECONDS)
        return {
            "vocab_size": 0,
            "engine_version": vllm_version(),
            "kv_cache_tokens": self._cache_tokens(),
            "flags": {"serve": command[len(VLLM) :]},
        }

    def bench(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Run the client once and return its result, with the lists of every request.

        Raises:
            ThroughputError: the server or the client ended, requests failed, or the system's clock
                was set meanwhile: the client sends by that clock.
        """
        what = Sending.model_validate(asked)
        wall, steady = time.time(), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            command = bench_command(self._settings, self._port, what, result)
            done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
            self._require_server()
            if done.returncode or not result.exists():
                raise ThroughputError(f"vllm bench serve ended with exit code {done.returncode}")
            found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if found.get("failed"):
            raise ThroughputError(_failed_requests(found, what.requests))
        jump = (time.time() - wall) - (time.monotonic() - steady)
        if abs(jump) > _JUMP_SECONDS:
            raise ThroughputError(
                f"the system's clock was set by {jump:+.1f} s while requests were sent; measure "
                "again"
            )
        return {key: found.get(key) for key in (*TRACED, "request_goodput")}

    def _require_server(self) -> None:
        code = self._server.poll()
        if code is not None:
            raise ThroughputError(f"vllm serve ended with exit code {code}")

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


def _failed_requests(found: dict[str, Any], requests: int) -> str:
    """How many failed, and what the first of them said."""
    said = next((str(error).strip() for error in found.get("errors") or () if error), "")
    last = said.splitlines()[-1][:200] if said else ""
    return f"{found['failed']} of {requests} requests failed" + (f": {last}" if last else "")


def server_command(settings: EngineSettings, port: int) -> list[str]:
    """Return the command line of the server."""
    eager = settings.on_cpu if settings.eager is None else settings.eager
    flags = {**memory_flags(settings), **parallel_flags(settings)}
    given = [
        part
        for name, value in flags.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    prefix = "--enable-prefix-caching" if settings.prefix_caching else "--no-enable-prefix-caching"
    return [
        *VLLM, "serve", settings.model,
        "--host", HOST, "--port", str(port),
        "--served-model-name", SERVED_NAME,
        "--disable-uvicorn-access-log",
        "--dtype", settings.dtype,
        "--seed", str(settings.seed),
        "--max-model-len", str(settings.sequence_tokens),
        "--max-num-seqs", str(settings.max_batch),
        *given,
        *(["--enforce-eager"] if eager else []),
        *(["--trust-remote-code"] if settings.trust_remote_code else []),
        prefix,
    ]  # fmt: skip


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


_SAID = {
    "weights_bytes": r"Model loading took ([\d.]+) ?GiB",
    "kv_cache_bytes": r"(?:Available KV cache memory:|reserved|(?:Explicitly|Auto) set)"
    r" \(?([\d.]+)(?: ?GiB|/)",
    "activations_bytes": r"([\d.]+) ?GiB for peak activation",
}


def memory_of(log: str) -> MemorySplit | None:
    """Return what a server's log says about its memory; None if it says nothing."""
    found = {name: re.search(pattern, log) for name, pattern in _SAID.items()}
    said = {name: round(float(match[1]) * _GIB) for name, match in found.items() if match}
    return MemorySplit(**said) if said else None
