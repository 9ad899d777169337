"""Hadamard matrices of the widths that models have."""

from __future__ import annotations

import pytest
import torch

from streamline_bench.errors import ArchitectureError
from streamline_bench.methods.maps.hadamard import hadamard

ORDERS = [1, 2, 4, 12, 20, 24, 28, 32, 36, 40, 44, 60, 64, 76, 84, 104, 180, 288, 448, 1600]


@pytest.mark.parametrize("order", ORDERS)
def test_entries_and_orthogonality(order: int) -> None:
    h = hadamard(order)
    assert h.shape == (order, order)
    assert h.abs().allclose(torch.full_like(h, order**-0.5), rtol=1e-14)
    torch.testing.assert_close(h @ h.T, torch.eye(order).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [3, 6, 30, 100])
def test_orders_without_a_construction_are_refused(order: int) -> None:
    with pytest.raises(ArchitectureError, match=f"order {order} .*ridge_map"):
        hadamard(order)
