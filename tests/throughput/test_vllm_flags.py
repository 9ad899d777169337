"""How vLLM is called; needs no vLLM."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from streamline_bench.throughput.bench import Sending, bench_command, sending
from streamline_bench.throughput.engines import EngineSettings
from streamline_bench.throughput.engines.vllm import memory_flags, parallel_flags
from streamline_bench.throughput.load import Level, ServingLoad
from streamline_bench.throughput.server import memory_of, server_command
from streamline_bench.throughput.workload import Workload

ON_GPU = EngineSettings(
    model="m", device="cuda", dtype="bfloat16", sequence_tokens=64, kv_cache_bytes=1000
)


def pairs(command: list[str]) -> set[tuple[str, str]]:
    return set(itertools.pairwise(command))


def test_a_given_cache_lifts_the_check_of_the_devices_share() -> None:
    """Else the second of two models on one device would not start."""
    assert memory_flags(ON_GPU) == {"kv_cache_memory_bytes": 1000, "gpu_memory_utilization": 0.05}
    on_cpu = ON_GPU.model_copy(update={"device": "cpu"})
    assert memory_flags(on_cpu) == {"kv_cache_memory_bytes": 1000}
    assert memory_flags(ON_GPU.model_copy(update={"kv_cache_bytes": None})) == {}


def test_server_command() -> None:
    command = server_command(ON_GPU, 8123)
    assert {("serve", "m"), ("--port", "8123"), ("--dtype", "bfloat16")} <= pairs(command)
    assert ("--gpu-memory-utilization", "0.05") in pairs(command)
    assert "--no-enable-prefix-caching" in command and "--enforce-eager" not in command
    asked = ON_GPU.model_copy(update={"prefix_caching": True, "device": "cpu"})
    command = server_command(asked, 8123)
    assert "--enable-prefix-caching" in command and "--enforce-eager" in command
    assert "--no-enforce-eager" not in server_command(ON_GPU.model_copy(update={"eager": False}), 1)


def asked(rate: float, concurrency: int | None = None, **changes: Any) -> Sending:
    load = ServingLoad(request_rates=(rate,), requests=7, warmup_requests=3, **changes)
    workload = Workload(prompt_tokens=5, output_tokens=6)
    return sending(load, workload, Level(rate, concurrency), seed=9)


def test_client_command() -> None:
    command = bench_command(ON_GPU, 8123, asked(float("inf"), 3), Path("/d/r.json"))
    expected = {
        ("--request-rate", "inf"), ("--num-prompts", "13"), ("--max-concurrency", "3"),
        ("--random-input-len", "5"), ("--random-output-len", "6"), ("--tokenizer", "m"),
        ("--result-dir", "/d"), ("--result-filename", "r.json"), ("--num-warmups", "0"),
        ("--seed", "9"), ("--burstiness", "1.0"),
    }  # fmt: skip
    assert expected <= pairs(command)
    assert {"--ignore-eos", "--save-result", "--save-detailed"} <= set(command)
    command = bench_command(ON_GPU, 1, asked(2.5, arrivals="constant"), Path("/r"))
    assert {("--request-rate", "2.5"), ("--burstiness", "inf")} <= pairs(command)
    assert ("--num-prompts", "10") in pairs(command) and "--max-concurrency" not in command
    at_once = bench_command(ON_GPU, 1, asked(float("inf")), Path("/r"))
    assert {("--num-warmups", "8"), ("--num-prompts", "7")} <= pairs(at_once)


def test_code_that_a_model_brings_along_runs_only_where_asked() -> None:
    """Server and client load the model's tokenizer, which may bring code, too."""
    for trusted in (True, False):
        settings = ON_GPU.model_copy(update={"trust_remote_code": trusted})
        commands = [
            server_command(settings, 1),
            bench_command(settings, 1, asked(1.0), Path("/r")),
        ]
        assert ["--trust-remote-code" in command for command in commands] == [trusted] * 2


def test_several_accelerators_and_dtype_of_the_cache_are_passed_on() -> None:
    assert parallel_flags(ON_GPU) == {}
    asked = ON_GPU.model_copy(update={"tensor_parallel": 2, "kv_cache_dtype": "fp8"})
    given = {("--tensor-parallel-size", "2"), ("--kv-cache-dtype", "fp8")}
    assert given <= pairs(server_command(asked, 1))
    assert not given & pairs(server_command(ON_GPU, 1))


def test_what_a_log_says_of_memory() -> None:
    log = (
        "INFO Model loading took 14.99 GiB memory and 3.2 seconds\n"
        "INFO Available KV cache memory: 1.5 GiB\n"
        "Actual usage is 15.2 GiB for consumed memory (weights + non-torch), 0.75 GiB for peak "
        "activation, and 0.5 GiB for CUDAGraph memory."
    )
    found = memory_of(log)
    assert found is not None and found.weights_bytes == round(14.99 * (1 << 30))
    assert (found.kv_cache_bytes, found.activations_bytes) == (3 << 29, 3 << 28)
    fixed = memory_of("Initial free memory 9.0 GiB, reserved 0.25 GiB memory for KV Cache as asked")
    assert fixed is not None and (fixed.kv_cache_bytes, fixed.weights_bytes) == (1 << 28, None)
    on_cpu = memory_of("INFO Explicitly set (0.05/23.54) GiB for KV cache on node 0.")
    assert on_cpu is not None and on_cpu.kv_cache_bytes == round(0.05 * (1 << 30))
    assert memory_of("nothing") is None
