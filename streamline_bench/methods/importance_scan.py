"""The importance scan of one compression: run once, taken up again after an interruption."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamline_bench.core.similarity import LastState, Similarity
from streamline_bench.methods.base import Compression

if TYPE_CHECKING:
    from streamline_bench.core.calibration import CalibrationTokens

__all__ = ["SIMILARITY_FILE", "scan_once"]

SIMILARITY_FILE = "similarity.json"


def scan_once(
    work: Compression, tokens: CalibrationTokens, last_state: LastState = "raw"
) -> Similarity:
    """Return the similarity of all boundaries, from the work folder if it is there already."""
    path = work.work / SIMILARITY_FILE
    if path.exists():
        return Similarity.load(path)
    from streamline_bench.core.importance import scan

    similarity = scan(work.model, tokens, last_state=last_state, progress=work.progress)
    similarity.save(path)
    return similarity
