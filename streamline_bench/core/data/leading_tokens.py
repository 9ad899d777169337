"""What a tokenizer puts in front of every text: BOS, of a few families several tokens.

A model has always seen them there. Text that is cut into rows after tokenising would lose them in
all rows but the first, so that every row gets them again (:func:`blocks_of`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from streamline_bench.errors import CalibrationError, library_errors

Ids = npt.NDArray[np.int64]


def leading_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that a tokenizer puts in front of every text; empty if it puts none.

    Raises:
        CalibrationError: the tokenizer fails on a text of one letter.
    """
    with library_errors("A text cannot be tokenised", kind=CalibrationError):
        whole = list(tokenizer("a", verbose=False)["input_ids"])
        plain = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    if plain and plain != whole:
        places = range(len(whole) - len(plain) + 1)
        begin = next((at for at in places if whole[at : at + len(plain)] == plain), 0)
        return tuple(whole[:begin])
    # Either the text has no known token, or the tokenizer's own code ignores the option.
    bos: int | None = getattr(tokenizer, "bos_token_id", None)
    if bos is None or whole[:1] != [bos] or (plain and len(whole) == 1):
        return ()
    return (bos,)


def name_of(leading: Sequence[int], tokenizer: Any) -> str:
    """Return leading tokens as text, as a tokenizer's vocabulary has them."""
    return "".join(map(str, tokenizer.convert_ids_to_tokens(list(leading))))


def begins_with(leading: Sequence[int], tokenizer: Any) -> str:
    """Return what a sequence begins with, as manifests say it: a token, or ``text``."""
    return name_of(leading, tokenizer) if leading else "text"


def with_leading_once(ids: Sequence[int], leading: Sequence[int]) -> Sequence[int]:
    """Return ids without the leading tokens that a text brought itself, behind the tokenizer's."""
    count, first = len(leading), list(leading)
    twice = count and list(ids[:count]) == first and list(ids[count : 2 * count]) == first
    return ids[count:] if twice else ids


def blocks_of(ids: Sequence[int] | Ids, length: int, leading: Sequence[int]) -> Iterator[Ids]:
    """Cut token ids into consecutive blocks of at most ``length``, the last one maybe shorter.

    Args:
        leading: tokens that every block begins with; one that does already gets no second ones.

    Raises:
        CalibrationError: a block has no room for more than these.
    """
    count = len(leading)
    if count >= length:
        raise CalibrationError(
            f"A sequence of {length} tokens has no room for text behind the {count} that the "
            "tokenizer puts in front; give a longer one."
        )
    stream, first = np.asarray(ids, dtype=np.int64), np.asarray(leading, dtype=np.int64)
    begin = 0
    while begin < len(stream):
        add = not np.array_equal(stream[begin : begin + count], first)
        part = stream[begin : begin + length - add * count]
        yield np.concatenate([first, part]) if add else part
        begin += len(part)
