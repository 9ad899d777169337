"""ReplaceMe's cosine objective: a linear map by Adam over rows kept in a memory-mapped file.

Several epochs over shuffled rows need the rows themselves, unlike least squares. They go to a file
in the compression's scratch folder, within a budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from streamline_bench.errors import CalibrationError, NumericsError
from streamline_bench.methods.tools.normal_equations import warn_of_few_rows

__all__ = ["RowStore", "fit_cosine"]


class RowStore:
    """Rows of several tensors side by side in one file, ``[rows, parts, hidden]``.

    Args:
        path: file to create; :meth:`close` removes it.
        rows: capacity.
        parts: tensors per row.
        hidden: width of each.
        dtype: what they are stored in.
        budget: most bytes the file may take.

    Raises:
        CalibrationError: it would take more.
    """

    def __init__(
        self, path: Path, rows: int, parts: int, hidden: int, dtype: torch.dtype, budget: float
    ) -> None:
        size = rows * parts * hidden
        if size * dtype.itemsize > budget:
            raise CalibrationError(
                f"The cosine objective keeps {size * dtype.itemsize / 1e9:.3g} GB of activations "
                f"of {rows} tokens and parameters.cache_gb allows {budget / 1e9:.3g}; raise it, "
                "give fewer calibration samples, or take objective lstsq, which keeps none."
            )
        self._path = path
        path.unlink(missing_ok=True)  # left by a killed attempt
        self._data = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
        self._data = self._data.view(rows, parts, hidden)
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def append(self, *parts: Tensor) -> None:
        """Add rows: one ``[n, hidden]`` tensor per part."""
        stop = self._used + len(parts[0])
        for number, part in enumerate(parts):
            self._data[self._used : stop, number] = part.to("cpu", self._data.dtype)
        self._used = stop

    def shuffled(self, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield float32 ``[batch, parts, hidden]`` in random order; the last batch may be short."""
        order = torch.randperm(self._used, generator=generator)
        for start in range(0, self._used, batch):
            yield self._data[order[start : start + batch]].float()

    def close(self) -> None:
        """Drop the file."""
        self._data = torch.empty(0)
        self._path.unlink(missing_ok=True)


def fit_cosine(
    rows: RowStore,
    hidden: int,
    *,
    diagonal: bool = False,
    epochs: int = 10,
    lr: float = 1e-4,
    batch: int = 1024,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> tuple[Tensor, list[float]]:
    """Minimise ``mean(1 - cos(x A + y, z))`` over A, which starts as the identity.

    Args:
        rows: parts ``(x, z)`` or ``(x, z, y)``; without y it is zero.
        hidden: width of the rows.
        diagonal: only the diagonal of A is learned.

    Returns:
        (A as float64 ``[hidden, hidden]``, mean loss of each epoch).

    Raises:
        NumericsError: the loss is not finite.
    """
    if not diagonal:
        warn_of_few_rows(len(rows), hidden)
    start = torch.ones(hidden) if diagonal else torch.eye(hidden)
    weight = start.to(device).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    steps = epochs * -(-len(rows) // batch)
    with tqdm(total=steps, desc="cosine map", delay=2, disable=not progress) as bar:
        for _ in range(epochs):
            total = 0.0
            for part in rows.shuffled(batch, generator):
                loss = _cosine_loss(part.to(device), weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += float(loss.detach()) * len(part)
                bar.update()
            losses.append(total / len(rows))
    found = weight.detach().to("cpu", torch.float64)
    if not bool(found.isfinite().all()):
        raise NumericsError("The cosine objective gave a map that is not finite; lower lr.")
    return torch.diag(found) if diagonal else found, losses


def _cosine_loss(part: Tensor, weight: Tensor) -> Any:
    mapped = part[:, 0] * weight if weight.ndim == 1 else part[:, 0] @ weight
    if part.shape[1] == 3:
        mapped = mapped + part[:, 2]
    return (1 - torch.nn.functional.cosine_similarity(mapped, part[:, 1], dim=-1)).mean()
