"""Hadamard matrices: Sylvester's for powers of two, Paley's for the sizes that models have.

Orders are ``2^k b`` with ``b`` from one of Paley's two constructions over a prime field, which
covers e.g. 768, 1600, 2304, 2880, 3584, 5120 and 12288. Where several exist, the smallest ``b`` is
taken. Hadamard matrices of one order are not unique; which one is used shows in a result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamline_bench.errors import ArchitectureError

__all__ = ["hadamard"]


def hadamard(order: int) -> Tensor:
    """Return an orthogonal ``[order, order]`` float64 matrix with entries ``± order^-1/2``.

    Raises:
        ArchitectureError: none of that order is constructed here (it must be 1, 2 or a multiple of
            4 of the form above).
    """
    base = order
    while base % 2 == 0:
        base //= 2
    matrix = torch.ones(1, 1, dtype=torch.float64)
    if base != 1:
        while base <= order and (found := _paley(base)) is None:
            base *= 2
        if base > order or found is None:
            raise ArchitectureError(
                f"No Hadamard matrix of order {order} can be constructed here (hidden size "
                f"{order}); use ridge_map, which needs none."
            )
        matrix = found
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(step, matrix)
    normalised: Tensor = matrix / order**0.5
    return normalised


def _paley(order: int) -> Tensor | None:
    if order % 4:
        return None
    if _is_prime(order - 1):  # then it is 3 modulo 4: the first construction
        core = _bordered(order - 1, below=-1.0)
        first: Tensor = core + torch.eye(order, dtype=torch.float64)
        return first
    q = order // 2 - 1
    if q % 4 == 1 and _is_prime(q):  # the second construction, on a symmetric conference matrix
        core = _bordered(q, below=1.0)
        off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        on = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, off) + torch.kron(torch.eye(q + 1, dtype=torch.float64), on)
    return None


def _bordered(q: int, below: float) -> Tensor:
    """Return the ``[q + 1, q + 1]`` conference matrix over the residues modulo a prime q."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q).square() % q] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:] = 1.0
    core[1:, 0] = below
    core[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    return core


def _is_prime(n: int) -> bool:
    return n > 2 and all(n % d for d in range(2, int(n**0.5) + 1))
