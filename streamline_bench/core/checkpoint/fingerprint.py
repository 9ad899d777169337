"""Names a model by its content: the same config and weights give the same hash, however sharded.

The hash covers the config without notes that do not change what the model computes, and every
tensor's name, dtype, shape and bytes. Tensor digests are cached per shard (by path, size and time
of change) under ``$STREAMLINE_BENCH_CACHE`` or ``~/.cache/streamline-bench``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from streamline_bench.core.checkpoint.tensor_file import TensorEntry
from streamline_bench.core.files.cache import user_cache
from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.errors import OutputError

if TYPE_CHECKING:
    from streamline_bench.core.checkpoint.reader import CheckpointReader

__all__ = ["config_digest", "fingerprint", "tensor_digests"]

_NOTES = {"_name_or_path", "transformers_version", "use_cache", "_commit_hash"}
_CHUNK = 1 << 22


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a config as canonical JSON, without notes such as the writer's version."""
    kept = {key: value for key, value in config.items() if key not in _NOTES}
    if "torch_dtype" in kept:  # the older spelling
        kept.setdefault("dtype", kept.pop("torch_dtype"))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def fingerprint(reader: CheckpointReader, progress: bool = True) -> str:
    """See :meth:`CheckpointReader.fingerprint`."""
    digests = tensor_digests(reader, progress)
    rows = [
        [name, entry.dtype, list(entry.shape), digests[name]]
        for name, entry in sorted(reader.entries.items())
    ]
    payload = json.dumps([config_digest(reader.config), rows])
    return hashlib.sha256(payload.encode()).hexdigest()


def tensor_digests(reader: CheckpointReader, progress: bool = True) -> dict[str, str]:
    """Return the SHA-256 (hex) of every tensor's bytes, by name; cached per shard."""
    shards: dict[Path, list[TensorEntry]] = defaultdict(list)
    for entry in reader.entries.values():
        shards[entry.shard].append(entry)
    total = sum(entry.nbytes for entry in reader.entries.values())
    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc="Hashing weights", delay=2,
        disable=not progress,
    )  # fmt: skip
    digests: dict[str, str] = {}
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, entries in shards.items():
            digests.update(_shard_digests(path, entries, pool, bar))
    return digests


def _shard_digests(
    path: Path, entries: list[TensorEntry], pool: ThreadPoolExecutor, bar: tqdm[Any]
) -> dict[str, str]:
    before = _identity(path)
    key = hashlib.sha256(json.dumps(before).encode()).hexdigest()
    record = user_cache() / "digests" / f"{key}.json"
    known = _read_record(record, before, entries)
    if known is not None:
        bar.update(sum(entry.nbytes for entry in entries))
        return known
    hashes = pool.map(lambda entry: _tensor_digest(entry, bar), entries)  # sha256 drops the GIL
    digests = {entry.name: value for entry, value in zip(entries, hashes, strict=True)}
    if _identity(path) == before:
        _write_record(record, before, digests)
    return digests


def _identity(path: Path) -> list[str | int]:
    resolved = path.resolve()
    status = resolved.stat()
    return [str(resolved), status.st_size, status.st_mtime_ns]


def _tensor_digest(entry: TensorEntry, bar: tqdm[Any]) -> str:
    digest = hashlib.sha256()
    left = entry.nbytes
    with entry.shard.open("rb", buffering=0) as file:
        file.seek(entry.begin)
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                break
            digest.update(chunk)
            left -= len(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _read_record(
    path: Path, identity: list[str | int], entries: list[TensorEntry]
) -> dict[str, str] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        digests = record["digests"]
        if record["identity"] == identity and digests.keys() == {e.name for e in entries}:
            return {str(name): str(value) for name, value in digests.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # absent or damaged: the weights are read again
    return None


def _write_record(path: Path, identity: list[str | int], digests: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps({"identity": identity, "digests": digests}))
    except (OSError, OutputError):
        pass  # a cache that cannot be written costs time, not the result
