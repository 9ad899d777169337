"""From what OpenCompass hands a model to text: plain prompts, and conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamline_bench.errors import CheckpointError, StreamlineBenchError

__all__ = ["chat_text", "messages_of", "plain_text"]

ROLES = {"HUMAN": "user", "BOT": "assistant", "SYSTEM": "system"}


def plain_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a prompt; the parts of a conversation are simply joined."""
    if isinstance(prompt, str):
        return prompt
    return "".join(_content(part) for part in prompt)


def messages_of(prompt: str | Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return a conversation for a chat template; neighbours of the same role become one message.

    Raises:
        StreamlineBenchError: a role that chat templates do not know.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages: list[dict[str, str]] = []
    for part in prompt:
        content = _content(part)
        if not content:
            continue
        role = _role(str(part["role"]))
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + content
        else:
            messages.append({"role": role, "content": content})
    return messages


def _content(part: Mapping[str, Any]) -> str:
    """OpenCompass's own templates say ``prompt``, those written as messages say ``content``."""
    return str(part["prompt"] if "prompt" in part else part["content"])


def _role(name: str) -> str:
    role = name if name in ROLES.values() else ROLES.get(name)
    if role is None:
        raise StreamlineBenchError(
            f"The prompt has the role '{name}'; chat templates know {', '.join(ROLES)}."
        )
    return role


def chat_text(
    tokenizer: Any, prompt: str | Sequence[Mapping[str, Any]], *, answer_follows: bool
) -> str:
    """Return a conversation in the tokenizer's chat template, special tokens written out.

    Args:
        answer_follows: end with the beginning of the assistant's turn.

    Raises:
        CheckpointError: the tokenizer has no chat template, or it refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template; use StreamlineModel "
            "for a base model, or save the template with the tokenizer."
        )
    try:
        text = tokenizer.apply_chat_template(
            messages_of(prompt), tokenize=False, add_generation_prompt=answer_follows
        )
    except Exception as error:  # jinja2's own errors, and whatever a template raises
        raise CheckpointError(
            f"The chat template of {tokenizer.name_or_path} refuses a conversation ({error})."
        ) from error
    return str(text)
