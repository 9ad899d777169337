"""One scan of a model on its calibration tokens for every recipe and size."""

from __future__ import annotations

import logging
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.files import LockHeld, LockUnwritable, awaited_lock
from streamline_bench.core.machine.ranks import current
from streamline_bench.core.scan import scan
from streamline_bench.core.similarity import LastState, Similarity
from streamline_bench.errors import CalibrationError, OutputError
from streamline_bench.methods.base import Compression

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
    with ExitStack() as stack:
        shared = _shared_scan(work, tokens, last_state, stack)
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


def _shared_scan(
    work: Compression, tokens: CalibrationTokens, last_state: LastState, stack: ExitStack
) -> Path | None:
    """Return the file of the shared scan, locked for as long as the stack; None: not shared."""
    if work.scans is None:
        return None
    path = work.scans / f"{tokens.sha256}-{last_state}.json"
    try:
        stack.enter_context(awaited_lock(path.with_suffix(".lock"), "scans the same text"))
    except (LockHeld, LockUnwritable):
        return None
    return path


def _known_scan(path: Path | None) -> Similarity | None:
    if path is None or not path.exists():
        return None
    try:
        return Similarity.load(path)
    except CalibrationError as error:
        log.warning("%s", error)
        path.unlink(missing_ok=True)
        return None
