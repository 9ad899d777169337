"""``vllm bench serve``: its command line, and the requests in its result."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Literal

from streamline_bench.core.machine.processes import HOST
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.throughput.engines import EngineSettings
from streamline_bench.throughput.load import Level, ServingLoad
from streamline_bench.throughput.workload import Workload

SERVED_NAME = "model"
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
_GOODPUT = ("ttft", "tpot", "e2el")


class Sending(Frozen):
    """One run of the client; it travels to the model's process as JSON.

    Attributes:
        rate: requests per second; None: each as soon as there is room.
        warmup: of the ``requests``, so many come first and do not count; requests sent all at once
            follow as many others instead.
        goodput: limits in milliseconds, by metric.
    """

    rate: float | None
    concurrency: int | None
    requests: int
    warmup: int
    prompt_tokens: int
    output_tokens: int
    prefix_tokens: int
    prompts: str
    output_lengths: Literal["fixed", "data"]
    arrivals: Literal["poisson", "constant"]
    seed: int
    goodput: dict[str, float]


def sending(load: ServingLoad, workload: Workload, level: Level, seed: int) -> Sending:
    """Return what is sent at one level; equal seeds send equal prompts at equal times."""
    warm, counted = load.counts(level, workload.output_tokens)
    limits = {} if load.slo is None else load.slo.limits
    return Sending(
        rate=None if math.isinf(level.rate) else level.rate,
        concurrency=level.concurrency,
        requests=warm + counted,
        warmup=warm,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        prefix_tokens=load.prefix_tokens,
        prompts=load.prompts,
        output_lengths=load.output_lengths,
        arrivals=load.arrivals,
        seed=seed,
        goodput={name: 1000 * seconds for name, seconds in limits.items()},
    )


def bench_command(settings: EngineSettings, port: int, asked: Sending, result: Path) -> list[str]:
    """Return the command line of the client, which writes ``result``."""
    at_once = asked.rate is None and asked.concurrency is None
    first = max(8, asked.requests // 4) if at_once else 0
    goodput = [f"{name}:{limit:g}" for name, limit in asked.goodput.items() if name in _GOODPUT]
    return [
        *VLLM, "bench", "serve",
        "--backend", "vllm",
        "--host", HOST, "--port", str(port),
        "--model", SERVED_NAME, "--tokenizer", settings.model,
        *_dataset(asked),
        "--ignore-eos",
        "--temperature", "0",
        "--seed", str(asked.seed),
        "--num-warmups", str(first),
        "--num-prompts", str(asked.requests),
        "--request-rate", "inf" if asked.rate is None else f"{asked.rate:g}",
        "--burstiness", "inf" if asked.arrivals == "constant" else "1.0",
        *(["--max-concurrency", str(asked.concurrency)] if asked.concurrency else []),
        *(["--trust-remote-code"] if settings.trust_remote_code else []),
        *(["--goodput", *goodput] if goodput else []),
        "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--disable-tqdm",
        "--save-result", "--save-detailed",
        "--result-dir", str(result.parent), "--result-filename", result.name,
    ]  # fmt: skip


def _dataset(asked: Sending) -> list[str]:
    if asked.prompts != "random":
        length = -1 if asked.output_lengths == "data" else asked.output_tokens
        return ["--dataset-name", "custom", "--dataset-path", asked.prompts,
                "--custom-output-len", str(length), "--skip-chat-template"]  # fmt: skip
    own = asked.prompt_tokens - asked.prefix_tokens
    shared = ["--random-prefix-len", str(asked.prefix_tokens)] if asked.prefix_tokens else []
    return ["--dataset-name", "random", *shared, "--random-input-len", str(own),
            "--random-output-len", str(asked.output_tokens)]  # fmt: skip
