"""How far a compressed model's next-token distributions are from the dense model's, on a text.

Both models read the same windows of the same text. At every position but the last of a window the
distributions over the vocabulary are compared: KL(dense || pruned), in nats, computed in float32
from the logits. Unlike perplexity, it also changes when probability moves between tokens that are
not in the text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from streamline_bench.core.architecture import sequence_limit
from streamline_bench.core.checkpoint.folder import resolve_pretrained
from streamline_bench.core.checkpoint.reader import CheckpointReader
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
from streamline_bench.core.machine.environment import free_memory
from streamline_bench.errors import (
    CalibrationError,
    ComparisonError,
    NumericsError,
    ResourceError,
    StreamlineBenchError,
    library_errors,
)
from streamline_bench.harness.trunk.partial import States, partial_pass
from streamline_bench.harness.trunk.stack import Stack, legs_of, read_stack, root_difference
from streamline_bench.harness.trunk.weights import WeightPool, agree
from streamline_bench.modeling.loading import dtype_name, load_model, load_tokenizer
from streamline_bench.stability.estimate import exponential
from streamline_bench.stability.statistics.intervals import mean_per_unit
from streamline_bench.stability.texts import MeasuredDivergence

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
) -> MeasuredDivergence:
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
        ResourceError: the memory does not hold both.
    """
    trusted = trust_remote_code if trust_pruned is None else trust_pruned
    found = token_divergences(
        dense, {"": Other(pruned, trusted)}, lambda: texts, window=window, batch_size=batch_size,
        device=device, dtype=dtype, confidence=confidence, trust_remote_code=trust_remote_code,
        progress=progress,
    )[""]  # fmt: skip
    if isinstance(found, StreamlineBenchError):
        raise found
    return found


class Other(NamedTuple):
    """What is compared with the dense model: checkpoint folder or hub name; may it run its code."""

    name: str | Path
    trusted: bool = False


def token_divergences(
    dense: str | Path,
    others: Mapping[str, Other],
    texts: Callable[[], Iterable[str]],
    *,
    window: int = 2048,
    batch_size: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    confidence: float = 0.95,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> dict[str, MeasuredDivergence | StreamlineBenchError]:
    """Compare several checkpoints with the dense model, with the results of each by itself.

    The dense model runs once for all of them, and of each only the layers from the first one on
    that is not the dense model's. All are in memory with equal weights held once; those that do not
    fit, or read other windows or other tokens, are compared after the others.

    Args:
        others: label -> checkpoint.
        texts: gives the documents, from the first one on whenever it is called.

    Returns:
        Label -> result, or why there is none. For all else see :func:`token_divergence`.

    Raises:
        CalibrationError: the tokenizer cannot be loaded, or a text cannot be tokenised.
        CheckpointError: the dense checkpoint cannot be loaded.
        ResourceError: the memory does not hold it.
    """
    folder = resolve_pretrained(dense)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    how: dict[str, Any] = {"device": device, "dtype": dtype}
    found: dict[str, MeasuredDivergence | StreamlineBenchError] = {}
    while left := {label: other for label, other in others.items() if label not in found}:
        party = _Party(_loaded(folder, trust_remote_code, **how), window)
        stack = _stack(folder, trust_remote_code, dtype) if len(left) > 1 else None
        for label, other in left.items():
            try:
                party.add(label, other, stack, how)
            except StreamlineBenchError as error:
                if not (party.rows and isinstance(error, ResourceError)):
                    found[label] = error
        with tqdm(desc="token divergence", unit="window", delay=2, disable=not progress) as bar:
            windows = _windows(texts(), tokenizer, party.window, party.vocabulary)
            while party.rows and (batch := list(itertools.islice(windows, batch_size))):
                found |= party.compare(batch, device)
                bar.update(len(batch))
        begins = begins_with(leading_tokens(tokenizer), tokenizer)
        for label, row in party.rows.items():
            found[label] = _result(row.sums, party.window, confidence, begins) if row.sums else (
                CalibrationError(
                    "None of the texts has two tokens, so that no token can be predicted; give "
                    "more text."
                )
            )  # fmt: skip
    return found


class _Row:
    """A model that is compared: it sets out from the dense model's states at ``start``."""

    def __init__(self, model: Any, stack: Stack | None, start: int) -> None:
        self.model = model
        self.start = start
        self.sums: list[tuple[float, ...]] = []
        self._stack = stack

    def logits(self, ids: Tensor, mask: Tensor, states: States, keep: Collection[int]) -> Tensor:
        """Return ``[batch, seq, vocabulary]``; the states at the boundaries ``keep`` are kept."""
        part: AbstractContextManager[None] = nullcontext()
        if self._stack is not None:
            steps = self._stack.steps
            part = partial_pass(self.model, steps, start=self.start, states=states, keep=keep)
        with part:
            output = self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        logits: Tensor = output.logits
        return logits


class _Party:
    """The dense model and those that are compared with it at the same time.

    Attributes:
        rows: by label.
        window, vocabulary: tokens of a window, and tokens that there are, for all of them.
    """

    def __init__(self, dense: Any, window: int) -> None:
        self.rows: dict[str, _Row] = {}
        self.window, self.vocabulary = window, 0
        self._dense, self._asked = dense, window
        self._stack: Stack | None = None
        self._pool = WeightPool()
        self._pool.share(dense)

    def add(self, label: str, other: Other, stack: Stack | None, how: Mapping[str, Any]) -> None:
        """Load a model, unless it reads other windows or tokens than those that are there.

        Args:
            stack: of the dense model; None: nothing is shared with it.
            how: what models are loaded with.

        Raises:
            ResourceError: the memory does not hold it.
            StreamlineBenchError: it cannot be loaded.
        """
        folder = resolve_pretrained(other.name)
        model = _loaded(folder, other.trusted, **how)
        limits = [sequence_limit(each.config.get_text_config()) for each in (self._dense, model)]
        window = min([self._asked, *(limit for limit in limits if limit)])
        sizes = [each.get_input_embeddings().weight.shape[0] for each in (self._dense, model)]
        if self.rows and (window, min(sizes)) != (self.window, self.vocabulary):
            return
        self.window, self.vocabulary = window, min(sizes)
        self._pool.share(model)
        own = None if stack is None else _stack(folder, other.trusted, how["dtype"])
        start = 0
        if stack is not None and own is not None and root_difference(own, stack) is None:
            start = legs_of(["dense", "row"], {"dense": stack, "row": own})[1].start
            if not agree(self._dense, model, own, start):
                start = 0
        self._stack = stack
        self.rows[label] = _Row(model, own, start)

    def compare(self, batch: Sequence[_Window], device: str) -> dict[str, StreamlineBenchError]:
        """Add a batch to the sums of all rows; return label -> why a row has left the party."""
        left: dict[str, StreamlineBenchError] = {}
        ids, mask = (each.to(device) for each in _padded(batch))
        states: States = {}
        keep = {row.start for row in self.rows.values() if row.start}
        with torch.inference_mode():
            dense = _Row(self._dense, self._stack, 0).logits(ids, mask, states, keep)
            for label, row in self.rows.items():
                try:
                    row.sums += _sums(dense, row.logits(ids, mask, states, ()), batch)
                except (ComparisonError, NumericsError) as error:
                    left[label] = error
        for label in left:
            del self.rows[label]
        return left


def _loaded(folder: Path, trusted: bool, *, device: str, dtype: str) -> Any:
    """Load a model, if there is room for its weights.

    Raises:
        ResourceError: there is not.
        StreamlineBenchError: it cannot be loaded.
    """
    kind = dtype_name(dtype)
    needed = CheckpointReader(folder).num_parameters * getattr(torch, kind).itemsize
    free = free_memory(device)
    if needed > free:
        smaller = "give dtype bfloat16, or " if kind == "float32" else ""
        raise ResourceError(
            f"The weights of {folder} need {needed / 1e9:.3g} GB in {kind}, and {free / 1e9:.3g} "
            f"GB are free on {device}; {smaller}free memory or take a machine with more."
        )
    return load_model(folder, trust_remote_code=trusted, device=device, dtype=dtype)


def _stack(folder: Path, trusted: bool, dtype: str) -> Stack | None:
    """Return the names of a model's layers; None if they cannot be told apart."""
    try:
        return read_stack(folder, dtype=dtype, trust_remote_code=trusted, progress=False)
    except StreamlineBenchError:
        return None


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


def _padded(batch: Sequence[_Window]) -> tuple[Tensor, Tensor]:
    """Return ids and mask, int64 ``[windows, longest]``."""
    longest = max(len(window.ids) for window in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
        mask[row, : len(window.ids)] = 1
    return ids, mask


def _sums(dense: Tensor, pruned: Tensor, batch: Sequence[_Window]) -> list[tuple[float, ...]]:
    """Document, tokens and :func:`_window_sums` of each window of a batch."""
    if dense.shape != pruned.shape:
        raise ComparisonError(
            f"The dense model has {dense.shape[-1]} tokens in its vocabulary and the pruned one "
            f"{pruned.shape[-1]}; their token distributions cannot be compared."
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
) -> MeasuredDivergence:
    """From document, tokens and :func:`_window_sums` of each window."""
    columns, what = np.array(rows, dtype=np.float64).T, "windows"
    _, labels = np.unique(columns[0], return_inverse=True)
    documents = int(labels.max()) + 1
    summed = np.stack(
        [np.bincount(labels, weights=column).astype(np.float64) for column in columns]
    )
    if documents > 1:
        columns, what = summed, "documents"
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
    return MeasuredDivergence(
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
        by_document=tuple(zip(summed[1].astype(int).tolist(), summed[2].tolist(), strict=True)),
    )
