"""The same content gives the same name, and nothing else does."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from streamline_bench.core.checkpoint.reader import CheckpointReader, config_digest


def test_fingerprint_names_content_not_layout(
    random_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = random_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    one, many = CheckpointReader(tmp_path / "one"), CheckpointReader(tmp_path / "many")
    assert one.fingerprint() == many.fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", one.fingerprint())


def test_fingerprint_is_computed_from_the_bytes(folder: Path) -> None:
    """As it always was: keys of the cache of an earlier version stay good."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    rows = []
    for name, value in sorted(header.items()):
        begin, end = value["data_offsets"]
        digest = hashlib.sha256(raw[start + begin : start + end]).hexdigest()
        rows.append([name, value["dtype"], value["shape"], digest])
    config = json.loads((folder / "config.json").read_text())
    payload = json.dumps([config_digest(config), rows])
    expected = hashlib.sha256(payload.encode()).hexdigest()
    assert CheckpointReader(folder).fingerprint() == expected


@pytest.mark.parametrize("key", ["transformers_version", "_name_or_path"])
def test_fingerprint_ignores_notes(folder: Path, key: str) -> None:
    before = CheckpointReader(folder).fingerprint()
    edit_config(folder, {key: "other"})
    assert CheckpointReader(folder).fingerprint() == before


def test_fingerprint_follows_config_and_weights(folder: Path) -> None:
    seen = {CheckpointReader(folder).fingerprint()}
    edit_config(folder, {"rms_norm_eps": 0.5})
    seen.add(CheckpointReader(folder).fingerprint())
    path = folder / "model.safetensors"
    state = load_file(path)
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    save_file(state, path, {"format": "pt"})
    seen.add(CheckpointReader(folder).fingerprint())
    state["model.norm.weight2"] = state.pop("model.norm.weight")
    save_file(state, path, {"format": "pt"})
    seen.add(CheckpointReader(folder).fingerprint())
    assert len(seen) == 4


def test_fingerprint_is_cached_until_the_file_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamline_bench.core.checkpoint import reader as module

    before = CheckpointReader(folder).fingerprint()
    reads: list[int] = []
    digest = module._tensor_digest
    monkeypatch.setattr(
        module,
        "_tensor_digest",
        lambda tensor, bar: (reads.append(tensor.nbytes), digest(tensor, bar))[1],
    )
    assert CheckpointReader(folder).fingerprint() == before
    assert reads == []
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert CheckpointReader(folder).fingerprint() != before
    assert len(reads) == len(CheckpointReader(folder).names)


@pytest.mark.parametrize("content", ["", "[]", '{"identity": [], "digests": 3}'])
def test_a_damaged_digest_cache_is_read_over(folder: Path, content: str) -> None:
    before = CheckpointReader(folder).fingerprint()
    records = list(Path(os.environ["STREAMLINE_BENCH_CACHE"]).rglob("*.json"))
    assert records
    for record in records:
        record.write_text(content)
    assert CheckpointReader(folder).fingerprint() == before


def test_a_cache_that_cannot_be_written_is_done_without(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = CheckpointReader(folder).fingerprint()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STREAMLINE_BENCH_CACHE", str(tmp_path / "file"))
    assert CheckpointReader(folder).fingerprint() == before


def edit_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
