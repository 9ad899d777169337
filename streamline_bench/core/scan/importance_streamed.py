"""The importance scan of a model that does not fit into memory."""

from __future__ import annotations

from pathlib import Path

import torch

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.scan.scan import scan
from streamline_bench.core.scan.similarity import LastState, Similarity
from streamline_bench.core.scan.streaming import streamed_model

__all__ = ["scan_streamed"]


def scan_streamed(
    folder: Path | str,
    tokens: CalibrationTokens,
    *,
    last_state: LastState = "raw",
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Similarity:
    """Scan a checkpoint layer by layer: the result of :func:`.importance.scan`, less memory.

    At any time the weights of the embeddings and of one layer are held. Every batch reads all
    layers once, so that a larger ``batch_size`` means fewer reads; memory for states grows with
    it as in :func:`.importance.scan`.

    Raises:
        CheckpointError: the folder is no sound checkpoint.
        ArchitectureError: the family is not in the table.
        NumericsError: a hidden state is NaN or infinite.
    """
    model = streamed_model(
        Path(folder), device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    return scan(model, tokens, last_state=last_state, batch_size=batch_size, progress=progress)
