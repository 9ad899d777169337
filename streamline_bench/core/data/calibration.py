"""Calibration tokens: which sequences a model is looked at, or trained, with.

:func:`load_calibration` tokenises a corpus (:mod:`streamline_bench.core.data.corpora`) into
:class:`CalibrationTokens` in one of two forms:

* ``packed``: documents are tokenised with the tokenizer's defaults, concatenated and cut into
  blocks of ``sequence_length``. Only full blocks are kept, unless an exact number of tokens is
  asked for: then the last block is padded and masked. A corpus shorter than one block gives one
  shorter sequence. Where the tokenizer puts BOS in front of a text, every block begins with it
  (:mod:`.leading_tokens`), unless ``packing: stream`` asks for the plain cut.
* ``documents``: one document per sequence, truncated at ``sequence_length``, padded on the right.

The mask is authoritative: a pad is never counted, even where the pad token is a real one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from streamline_bench.core.data.corpora import open_documents, resolve_source
from streamline_bench.core.data.leading_tokens import (
    Ids,
    begins_with,
    blocks_of,
    leading_tokens,
    with_leading_once,
)
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.errors import CalibrationError, library_errors

_DOCUMENTS_PER_CALL = 64


@dataclass(frozen=True, eq=False)
class CalibrationTokens:
    """Token sequences with their mask.

    Attributes:
        input_ids: int64 ``[n, T]``, padded on the right.
        attention_mask: bool ``[n, T]``, true where there is a token.
        source: the corpus, as it was named or found.
        num_tokens: number of tokens, pads not counted.
        sha256: hex digest of ids and mask.
        requested_length: the sequence length asked for, where the model's own limit cut it
            (``T`` is then smaller), else None.
        target_mask: bool ``[n, T]``, true for the tokens that a training predicts (the answers of
            instructions); None: all.
        begins_with: the token that each sequence begins with, ``text`` where none is put there;
            empty if unknown.
    """

    input_ids: Tensor
    attention_mask: Tensor
    source: str
    num_tokens: int
    sha256: str
    requested_length: int | None = None
    target_mask: Tensor | None = None
    begins_with: str = ""

    @classmethod
    def from_tensors(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        source: str = "tensors",
        target_mask: Tensor | None = None,
    ) -> CalibrationTokens:
        """Wrap ids ``[n, T]`` (and masks; None: no pads, all predicted), counting and hashing.

        Raises:
            CalibrationError: a sequence has no token at all.
        """
        ids = input_ids.to("cpu", torch.int64).contiguous()
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        mask = mask.to("cpu", torch.bool).contiguous()
        empty = (~mask.any(dim=1)).nonzero().flatten().tolist() if len(mask) else [0]
        if empty:
            raise CalibrationError(
                f"Sequence {empty[0]} of {source} has no tokens; leave empty sequences out."
            )
        if target_mask is None:
            return cls(ids, mask, source, int(mask.sum()), _digest(ids, mask))
        targets = target_mask.to("cpu", torch.bool).contiguous() & mask
        digest = _digest(ids, mask, targets)
        return cls(ids, mask, source, int(mask.sum()), digest, target_mask=targets)

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def batches(self, batch_size: int, *, trim: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(ids, mask)`` of up to ``batch_size`` sequences, in order.

        Args:
            trim: cut the columns in which the whole batch is padding.
        """
        for start in range(0, len(self), batch_size):
            ids = self.input_ids[start : start + batch_size]
            mask = self.attention_mask[start : start + batch_size]
            used = int(mask.any(dim=0).nonzero().max()) + 1 if trim else ids.shape[1]
            yield ids[:, :used], mask[:, :used]

    def split(self, share: float, seed: int) -> tuple[CalibrationTokens, CalibrationTokens]:
        """Part the sequences at random into ``(training, validation)``.

        Args:
            share: share of the sequences that go to validation; each part gets at least one.

        Raises:
            CalibrationError: there are fewer than two sequences.
        """
        count = len(self)
        if count < 2:
            raise CalibrationError(
                f"{self.source} gives {count} sequence, too few to set some aside for validation; "
                "give more text or a shorter sequence_length."
            )
        held_out = held_out_of(count, share)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        validation, training = order[:held_out].sort().values, order[held_out:].sort().values
        return self._rows(training), self._rows(validation)

    def summary(self) -> dict[str, Any]:
        """Return what a manifest records: source, counts, length and hash."""
        return {
            "source": self.source,
            "sequences": len(self),
            "sequence_length": int(self.input_ids.shape[1]),
            "requested_length": self.requested_length,
            "begins_with": self.begins_with,
            "tokens": self.num_tokens,
            "sha256": self.sha256,
        }

    def _rows(self, index: Tensor) -> CalibrationTokens:
        targets = None if self.target_mask is None else self.target_mask[index]
        part = self.from_tensors(
            self.input_ids[index], self.attention_mask[index], self.source, targets
        )
        return dataclasses.replace(
            part, requested_length=self.requested_length, begins_with=self.begins_with
        )


def held_out_of(count: int, share: float) -> int:
    """Return how many of ``count`` sequences are for validation: at least one, and not all."""
    return min(max(round(count * share), 1), count - 1)


def load_calibration(
    spec: CalibrationSpec,
    tokenizer: Any,
    *,
    model_folder: Path | None = None,
    max_length: int | None = None,
    vocabulary: int | None = None,
    progress: bool = True,
) -> CalibrationTokens:
    """Tokenise the corpus that ``spec`` names.

    The same spec, corpus and tokenizer give the same tokens: documents are shuffled by
    ``spec.seed``. ``spec.tokens`` is honoured exactly; ``spec.samples`` is an upper bound.

    Args:
        tokenizer: a transformers tokenizer; called with its defaults.
        model_folder: looked at for ``calibration.jsonl`` where the source is ``auto``.
        max_length: most positions the model has; a longer ``sequence_length`` is cut to it.
        vocabulary: tokens the model has embeddings for; None: not checked.

    Raises:
        CalibrationError: the corpus is missing, empty, unreadable, or too short for ``tokens``;
            or the form is ``instruction``, which only a recovery reads.
    """
    if spec.form == "instruction":
        raise CalibrationError(
            "Form 'instruction' is for the data of a recovery; give form 'packed' or 'documents'."
        )
    length = spec.length_within(max_length)
    source = resolve_source(spec.source, model_folder)
    plain_cut = spec.form == "packed" and spec.packing == "stream"
    leading = () if plain_cut else leading_tokens(tokenizer)
    with tqdm(
        total=_target(spec, length), unit="tok", desc="calibration", delay=2, disable=not progress
    ) as bar:
        texts = open_documents(spec, model_folder, tokenizer)
        ids = _tokenised(texts, tokenizer, leading, bar)
        if spec.form == "packed":
            rows = _packed(ids, spec, length, source, leading)
        else:
            rows = _documents(ids, spec, length, source)
    if not rows:
        raise CalibrationError(
            f"Calibration source {source} holds no text, or none that the model's tokenizer "
            "knows; give one with at least one document, or the tokenizer of the model."
        )
    require_known_tokens([row.max() for row in rows], tokenizer, vocabulary, source)
    tokens = CalibrationTokens.from_tensors(*_padded(rows, _pad_id(tokenizer)), source)
    cut = spec.sequence_length if length < spec.sequence_length else None
    begins = begins_with(leading, tokenizer)
    return dataclasses.replace(tokens, requested_length=cut, begins_with=begins)


def require_known_tokens(ids: Any, tokenizer: Any, vocabulary: int | None, source: str) -> None:
    """Refuse token ids for which the model has no embedding; on a GPU they end the process.

    Raises:
        CalibrationError: naming the token and its id.
    """
    largest = max((int(i) for i in ids), default=0)
    if vocabulary is not None and largest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise CalibrationError(
            f"{source} holds the token '{token}' (id {largest}), and the model has embeddings for "
            f"{vocabulary} tokens only; remove it from the text, or use the model's own tokenizer."
        )


def _target(spec: CalibrationSpec, length: int) -> int | None:
    if spec.tokens is not None or spec.samples is None:
        return spec.tokens
    return spec.samples * length if spec.form == "packed" else None


def _tokenised(
    texts: Iterable[str], tokenizer: Any, leading: Sequence[int], bar: tqdm[Any]
) -> Iterator[Ids]:
    texts = iter(texts)
    # Small first calls: a bounded request often needs a few documents only.
    for size in itertools.chain([1, 4, 16], itertools.repeat(_DOCUMENTS_PER_CALL)):
        batch = list(itertools.islice(texts, size))
        if not batch:
            return
        with library_errors("A calibration text cannot be tokenised", kind=CalibrationError):
            encoded = tokenizer(batch, verbose=False)["input_ids"]
        for ids in (with_leading_once(each, leading) for each in encoded):
            if len(ids):
                bar.update(len(ids))
                yield np.asarray(ids, dtype=np.int64)


def _packed(
    documents: Iterator[Ids],
    spec: CalibrationSpec,
    length: int,
    source: str,
    leading: Sequence[int],
) -> list[Ids]:
    wanted = spec.tokens
    if wanted is not None and spec.samples is not None and wanted > spec.samples * length:
        raise CalibrationError(
            f"{wanted} tokens do not fit into {spec.samples} sequences of {length}; ask for fewer "
            "tokens or more samples."
        )
    limit = wanted if wanted is not None else spec.samples and spec.samples * length
    held, total = [], 0
    for ids in documents:
        held.append(ids)
        total += len(ids)
        if limit is not None and total >= limit:
            break
    _require(wanted, total, source)
    stream = np.concatenate(held) if held else np.empty(0, np.int64)
    rows: list[Ids] = []
    total = 0
    for block in blocks_of(stream, length, leading):
        kept = block if limit is None else block[: limit - total]
        if wanted is None and rows and len(kept) < length:
            break  # only full blocks, but of a text that is shorter than one
        rows.append(kept)
        total += len(kept)
        if total == limit:
            break
    return rows


def _documents(
    documents: Iterator[Ids], spec: CalibrationSpec, length: int, source: str
) -> list[Ids]:
    rows: list[Ids] = []
    total = 0
    for ids in documents:
        room = length if spec.tokens is None else min(length, spec.tokens - total)
        rows.append(ids[:room])
        total += len(rows[-1])
        if total == spec.tokens or len(rows) == spec.samples:
            break
    _require(spec.tokens, total, f"{source} ({len(rows)} documents)")
    return rows


def _require(wanted: int | None, found: int, source: str) -> None:
    if wanted is not None and found < wanted:
        raise CalibrationError(
            f"{wanted} calibration tokens were asked for and {source} gives {found}; ask for at "
            "most that many or give more text."
        )


def _padded(rows: list[Ids], pad: int) -> tuple[Tensor, Tensor]:
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), lengths.max()), pad, dtype=np.int64)
    for row, target in zip(rows, ids, strict=True):
        target[: len(row)] = row
    mask = np.arange(ids.shape[1])[None, :] < lengths[:, None]
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _pad_id(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0


def _digest(ids: Tensor, *masks: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.numpy().astype("<i8", copy=False).tobytes())
    for mask in masks:
        digest.update(mask.numpy().astype("u1", copy=False).tobytes())
    return digest.hexdigest()
