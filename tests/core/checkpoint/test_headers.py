"""Headers of safetensors files that lie."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamline_bench.core.checkpoint.folder import read_header
from streamline_bench.errors import (
    CheckpointError,
)


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b"[" * 100_000,
        {"a": 3},
        {"a": {**GOOD, "shape": [-2]}},
        {"a": {**GOOD, "shape": [2.0]}},
        {"a": {**GOOD, "shape": "2"}},
        {"a": {**GOOD, "data_offsets": [0]}},
        {"a": {**GOOD, "data_offsets": [-8, 0]}},
        {"a": {**GOOD, "data_offsets": [True, 8]}},
        {"a": {**GOOD, "dtype": "F5"}},
        {"a": {**GOOD, "dtype": ["F32"]}},
        {"a": {**GOOD, "shape": [3]}},
        {"a": {**GOOD, "data_offsets": [8, 16]}, "b": {**GOOD, "data_offsets": [12, 20]}},
        {"a": {**GOOD, "data_offsets": [2**40, 2**40 + 8]}},
        {"a": {**GOOD, "shape": [2**62, 2**62]}},
        {"a": GOOD},  # and bytes behind it that belong to no tensor
    ],
)
def test_damaged_headers(tmp_path: Path, header: Any) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, header, bytes(32))
    with pytest.raises(CheckpointError, match=r"x\.safetensors .*download it again"):
        read_header(path)


@pytest.mark.parametrize(("dtype", "shape"), [("F4", [16]), ("C64", [1])])
def test_a_dtype_that_is_not_read_is_named(tmp_path: Path, dtype: str, shape: list[int]) -> None:
    path = tmp_path / "x.safetensors"
    header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]}}
    write_raw(path, header, bytes(8))
    with pytest.raises(CheckpointError, match=rf"'a'.*{dtype}.*convert"):
        read_header(path)


def test_a_header_longer_than_allowed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=r"x\.safetensors .*download it again"):
        read_header(path)


def test_the_header_is_read_without_torch(tmp_path: Path) -> None:
    write_raw(tmp_path / "x.safetensors", {"a": GOOD}, bytes(8))
    code = (
        "import sys; from pathlib import Path\n"
        "from streamline_bench.core.checkpoint.folder import read_header\n"
        "print(read_header(Path(sys.argv[1]))['a'].nbytes, 'torch' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.safetensors")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert shown.split() == ["8", "False"]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 100))
def test_random_bytes_give_one_of_our_errors(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, length: int
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + data)
    with contextlib.suppress(CheckpointError):
        assert read_header(path) == {}
