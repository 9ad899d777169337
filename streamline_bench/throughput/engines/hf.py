"""transformers' ``generate``: one static batch, exact output length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from streamline_bench.throughput.engines import Engine, EngineSettings, Loaded


class TransformersEngine(Engine):
    """Any checkpoint that transformers loads, ``streamline`` models included."""

    _model: Any
    _device: str

    @classmethod
    def environment(cls, settings: EngineSettings) -> Mapping[str, str]:
        """Keep transformers' own remarks out of the log."""
        return {"TRANSFORMERS_VERBOSITY": "error"}

    def load(self, settings: EngineSettings) -> Loaded:
        """Load the model and drop its generation settings, so that every model generates alike."""
        import torch
        from transformers import GenerationConfig

        from streamline_bench.modeling import register
        from streamline_bench.modeling.loading import CausalLM

        register()
        torch.manual_seed(settings.seed)
        chosen = {"attn_implementation": settings.attention} if settings.attention else {}
        model = CausalLM.from_pretrained(
            settings.model,
            dtype=getattr(torch, settings.dtype),
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
            **chosen,
        )
        config = model.config
        ends = config.eos_token_id
        ends = ends if isinstance(ends, list | tuple) else [ends]
        reserved = {config.pad_token_id, *ends, config.bos_token_id}
        # Without an end-of-sequence token nothing stops before the last token asked for.
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        self._device = settings.device
        self._model = model.to(settings.device).eval()
        return Loaded(
            vocab_size=config.get_text_config().vocab_size,
            reserved=sorted(token for token in reserved if isinstance(token, int) and token >= 0),
            device_name=None if settings.on_cpu else torch.cuda.get_device_name(),
            engine_version=metadata.version("transformers"),
            flags={
                "attention": config._attn_implementation,
                "compiled": False,
                "use_cache": True,
                "threads": torch.get_num_threads(),
            },
            versions={"cuda": torch.version.cuda} if torch.version.cuda else {},
        )

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[int]:
        """Generate one batch; the prompts must be equally long."""
        import torch

        ids = torch.tensor(prompts, device=self._device)
        self._synchronise()
        with torch.inference_mode():
            generated = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output_tokens,
                use_cache=True,
            )
        self._synchronise()
        return [int(generated.shape[1] - ids.shape[1])] * len(prompts)

    def device_peak_bytes(self) -> int | None:
        """Peak of what torch's allocator reserved, since the last call."""
        import torch

        if self._device == "cpu":
            return None
        peak = torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def _synchronise(self) -> None:
        import torch

        if self._device != "cpu":
            torch.cuda.synchronize()
