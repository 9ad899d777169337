"""Models run by vLLM."""

from __future__ import annotations

from streamline_bench.opencompass.chat_models import ChatPrompts
from streamline_bench.opencompass.engine import Engine
from streamline_bench.opencompass.models import StreamlineModel

__all__ = ["StreamlineVLLM", "StreamlineVLLMChat"]


class StreamlineVLLM(StreamlineModel):
    """A base model run by vLLM; scores and keys are those of :class:`StreamlineModel`.

    ``model_kwargs`` go to ``vllm.LLM`` as they are; a prompt may have one token less than the model
    reads, because vLLM always generates one. (OpenCompass's own class for vLLM
    divides by n - 1 where the others divide by n; this one does as the others.)

    Raises:
        MissingDependencyError: vLLM is not installed.
    """

    for_vllm = True

    def _make_engine(self) -> Engine:
        from streamline_bench.opencompass.vllm_engine import VLLMEngine

        engine = VLLMEngine(self.source, self.tokenizer, self.max_seq_len)
        self.max_seq_len = engine.max_length
        return engine


class StreamlineVLLMChat(ChatPrompts, StreamlineVLLM):
    """A chat model run by vLLM: as :class:`StreamlineVLLM`, with the chat template."""
