"""The cache of compressions: shared with run folders, checked before it is used, emptied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from streamline_bench.compression import load_recipe
from streamline_bench.compression.cache import cached_folder, entries, prune
from streamline_bench.compression.pipeline import compress_cached, compress_shared
from streamline_bench.core.checkpoint.folder import read_manifest, verify_files


@pytest.fixture
def shared(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], bool]:
    """Return a function that makes a row's checkpoint in a run folder; True: from the cache."""
    monkeypatch.setenv("STREAMLINE_BENCH_CACHE", str(tmp_path / "cache"))

    def make(run: str) -> bool:
        return compress_shared(
            tiny_llama,
            load_recipe("last_layers", {"n_layers": 2}),
            tmp_path / run,
            work=tmp_path / "work",
            progress=False,
        )

    return make


def test_runs_and_the_harness_share_and_a_changed_result_is_made_again(
    shared: Callable[[str], bool],
    tiny_llama: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert [shared("one"), shared("two")] == [False, True]
    found = compress_cached(tiny_llama, load_recipe("last_layers", {"n_layers": 2}), progress=False)
    assert found.reused
    weights = [path / "model.safetensors" for path in (tmp_path / "one", found.path)]
    assert weights[0].samefile(weights[1])
    # The files of the cache are another's to change: in a copy, as a tool would leave it.
    data = bytearray(weights[1].read_bytes())
    data[-1] ^= 1
    weights[1].unlink()
    weights[1].write_bytes(data)
    assert not shared("three")
    assert "made again" in caplog.text
    manifest = read_manifest(tmp_path / "three")
    assert manifest is not None
    verify_files(tmp_path / "three", manifest)


def test_pruning_leaves_run_folders_and_what_was_used_lately(
    shared: Callable[[str], bool], tmp_path: Path
) -> None:
    shared("one")
    (entry,) = [each for each in entries() if each.kind == "checkpoint"]
    assert entry.recipe == "last_layers 2"
    assert entry.bytes > entry.freed
    assert prune(unused_for=3600) == []
    assert [each.kind for each in prune(dry=True)].count("checkpoint") == 1
    assert cached_folder(entry.name).is_dir()
    prune()
    assert entries() == []
    assert (tmp_path / "one" / "model.safetensors").is_file()
