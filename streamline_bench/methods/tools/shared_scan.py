"""One look at a model on its calibration tokens for every size.

The folder of shared scans is that of one model, device and dtype. A scan there serves every recipe;
scores and the steps of a greedy search serve the recipes of one method, whatever their size.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.files import (
    LockHeld,
    LockUnwritable,
    atomic_write_bytes,
    awaited_lock,
)
from streamline_bench.core.machine.ranks import current
from streamline_bench.core.scan import scan
from streamline_bench.core.similarity import LastState, Similarity
from streamline_bench.errors import CalibrationError, OutputError
from streamline_bench.methods.base import Compression, method_facts

log = logging.getLogger(__name__)

SIMILARITY_FILE = "similarity.json"


def scan_once(work: Compression, tokens: CalibrationTokens, last_state: LastState) -> Similarity:
    """Return the scan: one serves every recipe and every size on the same model and tokens.

    It is taken from an interrupted attempt or from the cache if it is there; else it is made, and
    another process that wants the same one waits for it. Of the processes of one launch the main
    one scans, and the others get what it found.
    """
    return current().first(lambda: _scan_once(work, tokens, last_state))


def _scan_once(work: Compression, tokens: CalibrationTokens, last_state: LastState) -> Similarity:
    own = work.work / SIMILARITY_FILE
    if own.exists():
        return Similarity.load(own)
    with _shared(work, tokens, f"{last_state}.json") as shared:
        similarity = _known_scan(shared)
        if similarity is None:
            similarity = scan(
                work.model, tokens, last_state=last_state, work=work.work, progress=work.progress
            )
        elif shared is not None:
            log.info("the scan is taken from the cache (%s)", shared)
            similarity = replace(similarity, details={"calibration": tokens.summary()})
        similarity.save(own)
        if shared is not None and not shared.exists():
            with suppress(OutputError):
                similarity.save(shared)
    return similarity


@contextmanager
def _shared(work: Compression, tokens: CalibrationTokens, name: str) -> Iterator[Path | None]:
    """Yield a file that belongs to these tokens, locked; None: nothing is shared."""
    path = None if work.scans is None else work.scans / f"{tokens.sha256}-{name}"
    with ExitStack() as stack:
        if path is not None:
            try:
                stack.enter_context(
                    awaited_lock(path.with_suffix(".lock"), "looks at the same text")
                )
            except (LockHeld, LockUnwritable):
                path = None
        yield path


def _known_scan(path: Path | None) -> Similarity | None:
    if path is None or not path.exists():
        return None
    try:
        return Similarity.load(path)
    except CalibrationError as error:
        log.warning("%s", error)
        path.unlink(missing_ok=True)
        return None


def scores_once(
    work: Compression,
    tokens: CalibrationTokens,
    method: str,
    decided_by: Any,
    make: Callable[[], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Return scores by name: those of an earlier size, if they are in the cache; else make them.

    Args:
        method: whose scores they are: the recipe's method, or the one that selects for it.
        decided_by: what decides them beside the method's version, the model and the tokens; JSON.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    with _shared(work, tokens, f"{_name(method, decided_by)}.safetensors") as shared:
        if shared is not None and shared.exists():
            try:
                scores = load_file(shared)
            except (SafetensorError, OSError) as error:
                log.warning("%s is damaged and is made anew: %s", shared, error)
            else:
                log.info("the scores are taken from the cache (%s)", shared)
                return scores
        scores = make()
        if shared is not None:
            with suppress(OutputError):
                atomic_write_bytes(
                    shared, save({name: each.contiguous() for name, each in scores.items()})
                )
    return scores


@contextmanager
def steps_once(
    work: Compression, tokens: CalibrationTokens, method: str, decided_by: Any
) -> Iterator[Path]:
    """Yield the file of a greedy search's steps, which a search for another size continues.

    Args:
        method, decided_by: as for :func:`scores_once`.
    """
    with _shared(work, tokens, f"{_name(method, decided_by)}-steps.json") as shared:
        yield work.work / "greedy.json" if shared is None else shared


def _name(method: str, decided_by: Any) -> str:
    decided = json.dumps([method_facts(method), decided_by], sort_keys=True)
    return f"{method}-{hashlib.sha256(decided.encode()).hexdigest()[:16]}"
