"""Files written tensor by tensor are, byte for byte, those of the safetensors library."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from streamline_bench.core.checkpoint import shard
from streamline_bench.core.checkpoint.folder import DTYPES, TensorEntry, read_header
from streamline_bench.core.checkpoint.shard import Part, append_tensor, file_pieces, write_shard
from streamline_bench.errors import CheckpointError, OutputError


def tensors() -> dict[str, torch.Tensor]:
    """Tensors of every dtype that the library writes, of awkward shapes and names."""
    found = {
        f"t{number:02d}": torch.arange(3).to(getattr(torch, name))
        for number, (_, name) in enumerate(DTYPES.values())
        if name != "float8_e8m0fnu"  # the library's own table lacks it
    }
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(50, 40, generator=generator)
    more = {"large": large, "turned": large.t(), "part": large[3:7, 2:]}
    more |= {"scalar": torch.ones(()), "empty": torch.ones(0, 3), 'ö"\n\x7f\\': torch.ones(2)}
    return {**found, **more}


def saved(path: Path, given: dict[str, torch.Tensor]) -> bytes:
    separate = {name: tensor.contiguous().clone() for name, tensor in given.items()}
    save_file(separate, path, metadata={"format": "pt"})
    return path.read_bytes()


def test_a_tensor_is_written_in_another_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "_PIECE", 70)
    given = {name: torch.randn(40, 3).t() for name in "ab"} | {"c": torch.ones(())}
    write_shard(
        tmp_path / "own.safetensors",
        [Part.of(name, tensor, torch.bfloat16) for name, tensor in given.items()],
        metadata={"format": "pt"},
    )
    expected = {name: tensor.bfloat16() for name, tensor in given.items()}
    assert (tmp_path / "own.safetensors").read_bytes() == saved(tmp_path / "other", expected)


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_the_bytes_are_the_librarys(
    hashed: bool, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "_PIECE", piece)
    given, path = tensors(), tmp_path / "own.safetensors"
    expected = saved(tmp_path / "library.safetensors", given)
    copied = read_header(tmp_path / "library.safetensors")
    counts: list[int] = []
    for sources in (given, copied):
        parts = [Part.of(name, source) for name, source in sources.items()]
        digest = write_shard(
            path, parts, metadata={"format": "pt"}, hashed=hashed, advance=counts.append
        )
        assert path.read_bytes() == expected
        assert digest == (hashlib.sha256(expected).hexdigest() if hashed else "")
    assert sum(counts) == 2 * sum(tensor.nbytes for tensor in given.values())
    with safe_open(path, "pt") as file:
        assert all(torch.equal(file.get_tensor(n), t) for n, t in given.items() if "F8" not in n)


def test_a_file_system_that_cannot_copy_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = saved(tmp_path / "library.safetensors", tensors())

    def refused(*arguments: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    entries = read_header(tmp_path / "library.safetensors").items()
    path = tmp_path / "own.safetensors"
    write_shard(path, [Part.of(n, e) for n, e in entries], metadata={"format": "pt"})
    assert path.read_bytes() == expected


def test_places_of_tensors_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "_PIECE", 16)
    given = tensors()
    content = saved(tmp_path / "a.safetensors", given)
    for name, entry in read_header(tmp_path / "a.safetensors").items():
        flat = given[name].contiguous().reshape(-1).view(torch.uint8)
        found = b"".join(bytes(piece) for piece in file_pieces(entry))
        assert found == bytes(flat.tolist()) == content[entry.offset : entry.offset + entry.nbytes]


def test_tensors_one_after_another(tmp_path: Path) -> None:
    for value in (1, 2):
        append_tensor(tmp_path / "made", Part.of("x", torch.full((3,), value)))
    second = TensorEntry("x", tmp_path / "made", "I64", (3,), offset=24)
    assert torch.frombuffer(bytearray(next(file_pieces(second))), dtype=torch.int64).eq(2).all()


@pytest.mark.parametrize("hashed", [True, False])
def test_a_source_that_is_cut_off(hashed: bool, tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", {"long": torch.ones(1000), "short": torch.ones(1)})
    entries = read_header(tmp_path / "a.safetensors")
    os.truncate(tmp_path / "a.safetensors", 1000)
    with pytest.raises(CheckpointError, match=r"a\.safetensors changed.*'long'"):
        write_shard(tmp_path / "b", [Part.of("long", entries["long"])], hashed=hashed)


def test_a_dtype_that_no_file_holds() -> None:
    with pytest.raises(OutputError, match=r"'x'.*complex64.*float32"):
        Part.of("x", torch.ones(1, dtype=torch.complex64))
