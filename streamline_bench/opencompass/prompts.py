"""From what OpenCompass hands a model to text and token ids, cut to what the model reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from streamline_bench.errors import CheckpointError, StreamlineBenchError, library_errors
from streamline_bench.modeling.loading import name_other_templates

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


logger = logging.getLogger(__name__)


def load_prompt_tokenizer(
    name: str,
    *,
    pad_token_id: int | None = None,
    generation_pad: int | None = None,
    **options: Any,
) -> Any:
    """Return the tokenizer of a folder or hub id; prompts are cut from the left.

    Args:
        pad_token_id: instead of the tokenizer's own.
        generation_pad: the generation config's, for a tokenizer without one; then EOS.

    Raises:
        CheckpointError: there is none, or it has no token to pad with.
    """
    from transformers import AutoTokenizer

    with library_errors(
        f"No tokenizer can be loaded from {name}",
        "set tokenizer_path in the model's entry",
        CheckpointError,
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            name, **{"padding_side": "left", "truncation_side": "left", **options}
        )
    name_other_templates(name, tokenizer)
    if pad_token_id is not None:
        tokenizer.pad_token_id = pad_token_id
    elif tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = (
            generation_pad if generation_pad is not None else tokenizer.eos_token_id
        )
    if tokenizer.pad_token_id is None:
        raise CheckpointError(
            f"The tokenizer of {name} has neither a padding nor an end-of-text token; set "
            "pad_token_id in the model's entry."
        )
    _accept_false_pair(tokenizer)
    return tokenizer


def _accept_false_pair(tokenizer: Any) -> None:
    """Let ``encode(text, False, False)`` work, as CLPInferencer calls it.

    transformers 5 refuses False as the second text; the inferencer then falls back to guessing
    which special tokens to strip.
    """
    encode = tokenizer.encode

    def accepting(text: Any, text_pair: Any = None, *rest: Any, **options: Any) -> Any:
        return encode(text, text_pair or None, *rest, **options)

    tokenizer.encode = accepting


class PromptEncoder:
    """Encodes prompts, cutting those that are too long from the left (special tokens stay)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._warned = False

    def encode(
        self, texts: Sequence[str], *, limit: int, special: bool = True
    ) -> tuple[list[list[int]], list[int]]:
        """Return token ids of every text, and how many tokens each one lost.

        Args:
            limit: most tokens a text may keep.
            special: add the special tokens (a chat template has written them already).

        Raises:
            StreamlineBenchError: the limit leaves no room for a prompt.
        """
        if limit < 1:
            raise StreamlineBenchError(
                "No room is left for the prompt: max_out_len reaches max_seq_len; raise "
                "max_seq_len or lower max_out_len."
            )
        rows = self.tokenizer(list(texts), add_special_tokens=special)["input_ids"]
        lost = [max(0, len(row) - limit) for row in rows]
        for number, missing in enumerate(lost):
            if missing:
                rows[number] = self.tokenizer(
                    texts[number], add_special_tokens=special, truncation=True, max_length=limit
                )["input_ids"]
        if any(lost) and not self._warned:
            self._warned = True
            logger.warning(
                "Some prompts are longer than %d tokens and are cut from the left (max_seq_len).",
                limit,
            )
        return [list(map(int, row)) for row in rows], lost
