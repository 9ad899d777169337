"""Instruction data: a prompt and its answer per sequence, the loss on the answer alone."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.data.corpora import PRESETS, open_records, resolve_source
from streamline_bench.core.data.corpus_files import NullTexts, record_field
from streamline_bench.core.data.leading_tokens import begins_with, leading_tokens
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.errors import CalibrationError

log = logging.getLogger(__name__)

_REQUIRED = ("instruction", "output")
_INTRODUCTION = "Below is an instruction that describes a task"
_WITH_INPUT = ", paired with an input that provides further context"
_REQUEST = "Write a response that appropriately completes the request."


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """Return the prompt of the Alpaca data set, up to where the answer begins."""
    begin = f"{_INTRODUCTION}{_WITH_INPUT if given else ''}. {_REQUEST}"
    question = f"### Input:\n{given}\n\n" if given else ""
    return f"{begin}\n\n### Instruction:\n{instruction}\n\n{question}### Response:\n"


def load_instructions(
    spec: CalibrationSpec,
    tokenizer: Any,
    *,
    train_on_inputs: bool = False,
    model_folder: Path | None = None,
    max_length: int | None = None,
    progress: bool = True,
) -> CalibrationTokens:
    """Tokenise records with ``instruction``, ``input`` (may be empty or missing) and ``output``.

    One record per sequence, an end-of-sequence token behind it, cut at ``spec.sequence_length``,
    padded on the right. ``target_mask`` marks the answers (None with ``train_on_inputs``). Records
    whose answer is cut off entirely are left out.

    Args:
        max_length: most positions the model has.

    Raises:
        CalibrationError: the source is missing or no instruction data, nothing is left of it, or
            ``spec.tokens`` is set, which would cut answers.
    """
    source = resolve_source(spec.source, model_folder)
    if source in PRESETS:
        raise CalibrationError(
            f"Data source '{source}' holds texts, not instructions; give records with instruction "
            "and output, e.g. recovery.training.data.source=yahma/alpaca-cleaned."
        )
    if spec.tokens is not None:
        raise CalibrationError(
            f"tokens={spec.tokens} cannot be used with instruction data, which is counted in "
            "records; give samples instead."
        )
    length = spec.length_within(max_length)
    rows: list[list[int]] = []
    answers: list[int] = []
    cut = 0
    records = open_records(spec, model_folder)
    bar = tqdm(records, desc="instructions", unit="row", delay=2, disable=not progress)
    for prompt, answer in _texts(bar, source):
        ids, begin = _tokenised(tokenizer, prompt, answer)
        if begin >= length:
            cut += 1
            continue
        rows.append(ids[:length])
        answers.append(begin)
        if len(rows) == spec.samples:
            break
    if not rows:
        raise CalibrationError(
            f"{source} has no record whose answer begins within {length} tokens; raise "
            "sequence_length."
        )
    if cut:
        log.warning("%d records left out: their answer begins after %d tokens", cut, length)
    tokens = _padded(rows, None if train_on_inputs else answers, tokenizer, source)
    requested = spec.sequence_length if length < spec.sequence_length else None
    begins = begins_with(leading_tokens(tokenizer), tokenizer)
    return dataclasses.replace(tokens, requested_length=requested, begins_with=begins)


def _texts(records: Iterable[Mapping[str, Any]], source: str) -> Iterator[tuple[str, str]]:
    nulls = NullTexts(source, "their instruction or output is null")
    remedy = "instruction data has the fields instruction and output, and maybe input"
    try:
        for record in records:
            fields = [record_field(record, key, source, remedy) for key in _REQUIRED]
            if nulls.among(fields):
                continue
            texts = [*fields, record.get("input") or ""]
            if not all(isinstance(text, str) for text in texts):
                raise CalibrationError(
                    f"A record of {source} has something other than text in instruction, input or "
                    "output; correct it."
                )
            yield alpaca_prompt(texts[0], texts[2]), texts[1]
    finally:  # also when nobody reads on
        nulls.warn()


def _tokenised(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """Return the ids of prompt and answer, and where the answer begins.

    A token that holds the end of the prompt and the beginning of the answer belongs to the answer.
    """
    before = tokenizer(prompt, verbose=False)["input_ids"]
    ids = list(tokenizer(prompt + answer, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    if end is not None and (not ids or ids[-1] != end):
        ids.append(end)
    begin = 0
    while begin < min(len(before), len(ids)) and before[begin] == ids[begin]:
        begin += 1
    return ids, begin


def _padded(
    rows: list[list[int]], answers: list[int] | None, tokenizer: Any, source: str
) -> CalibrationTokens:
    end = tokenizer.eos_token_id
    pad = next((i for i in (tokenizer.pad_token_id, end) if i is not None), 0)
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    positions = torch.arange(ids.shape[1])[None, :]
    mask = positions < lengths[:, None]
    targets = None if answers is None else mask & (positions >= torch.tensor(answers)[:, None])
    return CalibrationTokens.from_tensors(ids, mask, source, targets)
