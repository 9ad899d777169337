"""How far a compressed model's next-token distributions are from the dense model's, on a text.

Both models read the same windows of the same text. At every position but the last of a window the
distributions over the vocabulary are compared: KL(dense || pruned), in nats, computed in float32
from the logits. Unlike perplexity, it also changes when probability moves between tokens that are
not in the text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from streamline_bench.core.architecture import sequence_limit
from streamline_bench.core.checkpoint.folder import resolve_pretrained
from streamline_bench.core.data.calibration import require_known_tokens
from streamline_bench.core.data.corpus_files import (
    OF_TEXTS,
    NullTexts,
    document_text,
    file_kind,
    read_file,
)
from streamline_bench.core.data.leading_tokens import (
    begins_with,
    blocks_of,
    leading_tokens,
    with_leading_once,
)
from streamline_bench.errors import CalibrationError, ComparisonError, NumericsError, library_errors
from streamline_bench.modeling.loading import load_model, load_tokenizer
from streamline_bench.stability.estimate import exponential
from streamline_bench.stability.statistics.intervals import mean_per_unit
from streamline_bench.stability.texts import TokenDivergence

_POSITIONS = 256  # whose distributions are in memory at once, in float32


class _Window(NamedTuple):
    """Tokens of a document; ``first`` is the place of the first one that is predicted."""

    document: int
    ids: list[int]
    first: int


def read_texts(path: Path, field: str = "text", tokenizer: Any = None) -> Iterator[str]:
    """Yield the documents of a file, in its order (see :mod:`.corpus_files` for the kinds).

    Args:
        field: of a record with fields, the one that holds the text.
        tokenizer: whose chat template writes conversations.

    Raises:
        CalibrationError: no such file, another kind of file, a damaged one, or a record without
            the field.
    """
    text_only = file_kind(path) == "text"
    nulls = NullTexts(str(path))
    try:
        for record in read_file(path):
            name = "text" if text_only else field
            yield nulls.text(document_text(record, name, str(path), tokenizer, OF_TEXTS))
    finally:  # also when nobody reads on
        nulls.warn()


def token_divergence(
    dense: str | Path,
    pruned: str | Path,
    texts: Iterable[str],
    *,
    window: int = 2048,
    batch_size: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    confidence: float = 0.95,
    trust_remote_code: bool = False,
    trust_pruned: bool | None = None,
    progress: bool = True,
) -> TokenDivergence:
    """Compare the token distributions of two checkpoints on a text.

    Texts are read as they come; both models are in memory, and the logits of one batch of each.
    Documents are cut into consecutive windows. Where the tokenizer puts a BOS token in front of a
    text, every window begins with it, and all tokens of the text are predicted; otherwise the first
    token of each window is not. Intervals are over documents, as tokens of one are not independent;
    over windows if there is only one document.

    Args:
        dense: checkpoint folder, or hub name; its tokenizer's defaults are used for the texts.
        pruned: the same, with the same vocabulary.
        texts: documents; those of fewer than two tokens are skipped.
        window: tokens per window; at most as many as both models read with unchanged rotary
            frequencies (:func:`.sequence_limit`).
        trust_pruned: let the second model run code that comes with it; None: as the dense one.
        dtype: of the models' weights; the distributions are compared in float32 in any case.

    Raises:
        CalibrationError: no text has two tokens, or the tokenizer cannot be loaded.
        CheckpointError: a checkpoint cannot be loaded.
        ComparisonError: the vocabularies differ.
        NumericsError: a logit is not finite; model and document are named.
    """
    folders = resolve_pretrained(dense), resolve_pretrained(pruned)
    tokenizer = load_tokenizer(folders[0], trust_remote_code=trust_remote_code)
    trusted = trust_remote_code, trust_remote_code if trust_pruned is None else trust_pruned
    models = [
        load_model(folder, device=device, dtype=dtype, trust_remote_code=trust)
        for folder, trust in zip(folders, trusted, strict=True)
    ]
    limits = [sequence_limit(model.config.get_text_config()) for model in models]
    window = min([window, *(limit for limit in limits if limit)])
    vocabulary = min(model.get_input_embeddings().weight.shape[0] for model in models)
    rows: list[tuple[float, ...]] = []
    with tqdm(desc="token divergence", unit="window", delay=2, disable=not progress) as bar:
        windows = _windows(texts, tokenizer, window, vocabulary)
        while batch := list(itertools.islice(windows, batch_size)):
            rows += _compare(models, batch, device)
            bar.update(len(batch))
    if not rows:
        raise CalibrationError(
            "None of the texts has two tokens, so that no token can be predicted; give more text."
        )
    return _result(rows, window, confidence, begins_with(leading_tokens(tokenizer), tokenizer))


def _windows(
    texts: Iterable[str], tokenizer: Any, window: int, vocabulary: int
) -> Iterator[_Window]:
    if window < 2:
        raise CalibrationError(
            f"A window of {window} token has nothing to predict; give 2 or more."
        )
    leading = leading_tokens(tokenizer)
    first = max(1, len(leading))
    for document, text in enumerate(texts):
        name = f"Document {document} of the text"
        with library_errors(f"{name} cannot be tokenised", kind=CalibrationError):
            ids = tokenizer(text, verbose=False)["input_ids"]
        require_known_tokens(ids, tokenizer, vocabulary, name)
        for part in blocks_of(with_leading_once(ids, leading), window, leading):
            if len(part) > first:
                yield _Window(document, part.tolist(), first)


def _compare(models: list[Any], batch: list[_Window], device: str) -> list[tuple[float, ...]]:
    longest = max(len(window.ids) for window in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
        mask[row, : len(window.ids)] = 1
    with torch.inference_mode():
        dense, pruned = (
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            for model in models
        )
        if dense.shape != pruned.shape:
            raise ComparisonError(
                f"The dense model has {dense.shape[-1]} tokens in its vocabulary and the pruned "
                f"one {pruned.shape[-1]}; their token distributions cannot be compared."
            )
        return [
            (
                window.document,
                len(window.ids) - window.first,
                *_window_sums(dense[row], pruned[row], window),
            )
            for row, window in enumerate(batch)
        ]


def _window_sums(dense: Tensor, pruned: Tensor, window: _Window) -> list[float]:
    """KL, equal first tokens and both log-likelihoods, summed over the window's positions."""
    total = torch.zeros(4, dtype=torch.float64)
    targets = torch.tensor(window.ids[window.first :], device=dense.device).unsqueeze(1)
    dense, pruned = dense[window.first - 1 :], pruned[window.first - 1 :]
    for begin in range(0, len(targets), _POSITIONS):
        end = min(begin + _POSITIONS, len(targets))
        shares = []
        for name, logits in (("dense", dense), ("pruned", pruned)):
            part = torch.log_softmax(logits[begin:end].float(), dim=-1)
            if not bool(torch.isfinite(part).all()):
                raise NumericsError(
                    f"The {name} model's logits are not finite on document {window.document} of "
                    "the text; check its weights, or use dtype float32."
                )
            shares.append(part)
        first, second = shares
        kl = (first.exp() * (first - second)).sum(dim=-1)
        same = first.argmax(dim=-1) == second.argmax(dim=-1)
        seen = [part.gather(1, targets[begin:end]).squeeze(1) for part in shares]
        # Rounding must not make equal distributions nearer than equal.
        columns = [kl.clamp(min=0.0), same, *seen]
        total += torch.stack([column.double().sum() for column in columns]).cpu()
    return [float(value) for value in total.tolist()]


def _result(
    rows: list[tuple[float, ...]], window: int, confidence: float, begins: str = ""
) -> TokenDivergence:
    """From document, tokens and :func:`_window_sums` of each window."""
    columns, what = np.array(rows, dtype=np.float64).T, "windows"
    _, labels = np.unique(columns[0], return_inverse=True)
    documents = int(labels.max()) + 1
    if documents > 1:
        columns = np.stack([np.bincount(labels, weights=column) for column in columns])
        what = "documents"
    tokens, kl, same, dense, pruned = columns[1:]
    estimates = [
        mean_per_unit(column, tokens, confidence, what=what, bounds=bounds)
        for column, bounds in (
            (kl, (0.0, math.inf)),
            (same, (0.0, 1.0)),
            (dense - pruned, (-math.inf, math.inf)),
        )
    ]
    count = float(tokens.sum())
    return TokenDivergence(
        documents=documents,
        windows=len(rows),
        tokens=int(count),
        window=window,
        begins_with=begins,
        kl=estimates[0],
        same_top=estimates[1],
        dense_perplexity=exponential(-float(dense.sum()) / count),
        pruned_perplexity=exponential(-float(pruned.sum()) / count),
        nats_per_token=estimates[2],
    )
