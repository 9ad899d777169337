"""Headers of safetensors files that lie."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamline_bench.core.checkpoint.tensor_file import read_header
from streamline_bench.errors import (
    CheckpointError,
)


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "damaged header"),
        (b"[1, 2]", "damaged header"),
        (b"[" * 100_000, "damaged header"),
        ({"a": 3}, "damaged way"),
        ({"a": {**GOOD, "shape": [-2]}}, "damaged way"),
        ({"a": {**GOOD, "shape": [2.0]}}, "damaged way"),
        ({"a": {**GOOD, "shape": "2"}}, "damaged way"),
        ({"a": {**GOOD, "data_offsets": [0]}}, "damaged way"),
        ({"a": {**GOOD, "data_offsets": [-8, 0]}}, "damaged way"),
        ({"a": {**GOOD, "data_offsets": [True, 8]}}, "damaged way"),
        ({"a": {**GOOD, "dtype": "F4"}}, "dtype 'F4', which is not supported"),
        ({"a": {**GOOD, "dtype": ["F32"]}}, "damaged way"),
        ({"a": {**GOOD, "shape": [3]}}, "needs 12 bytes and is given 8"),
        ({"a": {**GOOD, "data_offsets": [8, 16]}, "b": {**GOOD, "data_offsets": [12, 20]}},
         "'b' overlap"),
        ({"a": {**GOOD, "data_offsets": [2**40, 2**40 + 8]}}, "truncated"),
        ({"a": {**GOOD, "shape": [2**62, 2**62]}}, "needs"),
    ],
)  # fmt: skip
def test_damaged_headers(tmp_path: Path, header: Any, message: str) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, header, bytes(32))
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_a_header_longer_than_allowed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=f"claims a header of {2**60} bytes"):
        read_header(path)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 100))
def test_random_bytes_give_one_of_our_errors(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, length: int
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + data)
    with contextlib.suppress(CheckpointError):
        assert read_header(path) == {}
