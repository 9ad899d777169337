"""Chat models: prompts go through the tokenizer's chat template."""

from __future__ import annotations

from typing import Any

from opencompass.models.base_api import APITemplateParser

from streamline_bench.opencompass.models import Prompt, StreamlineModel
from streamline_bench.opencompass.prompts import chat_text

__all__ = ["ChatPrompts", "StreamlineChatModel"]


class ChatPrompts(StreamlineModel):
    """Puts prompts into the tokenizer's chat template."""

    _adds_special = False

    def __init__(self, path: str, *, meta_template: Any = None, **arguments: Any) -> None:
        super().__init__(path, **arguments)
        self.template_parser = APITemplateParser(meta_template or _chat_roles())

    def _score_text(self, prompt: Prompt) -> str:
        return chat_text(self.tokenizer, prompt, answer_follows=False)

    def _generation_text(self, prompt: Prompt) -> str:
        return chat_text(self.tokenizer, prompt, answer_follows=True)


class StreamlineChatModel(ChatPrompts):
    """A chat model: as :class:`StreamlineModel`, with the tokenizer's chat template.

    Scored prompts (PPL) go through the template as well, as finished conversations.
    """


def _chat_roles() -> dict[str, Any]:
    return {
        "round": [
            {"role": "HUMAN", "api_role": "HUMAN"},
            # Few templates take a system message among the examples; OpenCompass maps it so too.
            {"role": "SYSTEM", "api_role": "HUMAN"},
            {"role": "BOT", "api_role": "BOT", "generate": True},
        ]
    }
