"""The cache of compressed models: found by content, shared with run folders, listed and emptied.

::

    <cache>/compressed/<key>/             a checkpoint, or a link to that of a run folder
    <cache>/compressed/<key>.checked.json sizes and times of its files when they were last hashed
    <cache>/compressed/<key>.lock         held while it is made, taken or removed
    <cache>/work/<key>/                   interrupted work, for the next attempt
    <cache>/scans/<key>/                  similarities of the layers of a model, by its tokens
    <cache>/digests/                      SHA-256 of tensors, by file

A run folder and the cache share files where one file system holds both, so that neither is harmed
when the other is deleted.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamline_bench.core.checkpoint.folder import (
    Manifest,
    read_manifest,
    verify_files,
    write_manifest,
)
from streamline_bench.core.files import (
    PATIENCE,
    LockHeld,
    LockUnwritable,
    atomic_write_text,
    awaited_lock,
    staged_output,
)
from streamline_bench.core.machine.environment import user_cache
from streamline_bench.errors import CacheError, CheckpointError

log = logging.getLogger(__name__)

_RECORDS = ("scans", "digests")
"""Folders of small files that are made again where they are missing."""


def cache_root(cache: Path | None = None) -> Path:
    """Return the cache folder: the argument, ``$STREAMLINE_BENCH_CACHE`` or the user's cache."""
    return Path(cache).expanduser() if cache else user_cache()


def cached_folder(key: str, cache: Path | None = None) -> Path:
    """Return where the checkpoint of a key lies, whether it is there or not."""
    return cache_root(cache) / "compressed" / key


@contextmanager
def alone(path: Path, *, patience: float = PATIENCE) -> Iterator[None]:
    """Hold a file lock; another process that wants it waits.

    Raises:
        CacheError: it cannot be made, or another process holds it for longer than ``patience``.
    """
    try:
        with awaited_lock(path, "makes the same checkpoint", patience=patience):
            yield
    except LockHeld:
        raise CacheError(f"{path} is held by another process; stop it or wait.") from None
    except LockUnwritable as error:
        raise _unwritable(path.parent, error.reason) from None


def make_folder(folder: Path) -> None:
    """Make a folder of the cache (CacheError: it cannot be made)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError | str) -> CacheError:
    reason = getattr(error, "strerror", None) or error
    return CacheError(
        f"The cache {folder} cannot be written ({reason}); set "
        "STREAMLINE_BENCH_CACHE to a writable folder."
    )


def is_whole(folder: Path) -> bool:
    """Whether there is a checkpoint in a folder of the cache, with the files of its manifest."""
    try:
        manifest = read_manifest(folder)
        if manifest is not None:
            _check(folder, manifest)
    except CheckpointError:
        return False
    return manifest is not None


def find_cached(key: str, cache: Path | None = None) -> Path | None:
    """Return the whole checkpoint of a key; None: there is none, or it was changed since.

    Its files are hashed unless they have the sizes and times with which they were hashed before.
    A changed one is removed, which the log says. The caller holds the lock of the key.
    """
    folder = cached_folder(key, cache)
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            _remove(folder)  # a link to a run folder that is gone
            return None
        _check(folder, manifest)
    except CheckpointError as error:
        log.warning("The cached checkpoint is not used and made again: %s", error)
        _remove(folder)
        return None
    return folder


def _check(folder: Path, manifest: Manifest) -> None:
    record = folder.with_name(f"{folder.name}.checked.json")
    found = _marks(folder, manifest)
    with suppress(OSError, ValueError):
        if json.loads(record.read_text("utf-8")) == found:
            os.utime(record)  # when it was last used
            return
    verify_files(folder, manifest)
    with suppress(OSError):
        atomic_write_text(record, json.dumps(found) + "\n")


def _marks(folder: Path, manifest: Manifest) -> dict[str, Any]:
    marks = {}
    for name in manifest.files:
        with suppress(OSError):
            status = (folder / name).stat()
            marks[name] = [manifest.files[name], status.st_size, status.st_mtime_ns]
    return marks


def take(folder: Path, output: Path, recipe: dict[str, Any]) -> None:
    """Put a cached checkpoint into a run folder, under the name of the recipe that asked for it.

    OutputError: it cannot be written there.
    """
    manifest = read_manifest(folder)
    assert manifest is not None  # found a moment ago
    with staged_output(output, overwrite=True) as staging:
        for name in manifest.files:
            _link(folder / name, staging / name)
        write_manifest(staging, manifest.model_copy(update={"recipe": recipe}))


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def share(output: Path, key: str, cache: Path | None = None) -> None:
    """Let later runs find a checkpoint that was just made in a run folder.

    Where files cannot be shared, the cache has a link to the folder. The caller holds the lock.
    """
    folder = cached_folder(key, cache)
    try:
        _remove(folder)
        if output.stat().st_dev == folder.parent.stat().st_dev:
            with staged_output(folder) as staging:
                for path in sorted(each for each in output.rglob("*") if each.is_file()):
                    _link(path, staging / path.relative_to(output))
        else:
            folder.symlink_to(output.resolve(), target_is_directory=True)
    except OSError as error:
        log.warning("%s cannot be shared with other runs (%s).", output, error.strerror)


def _remove(folder: Path) -> None:
    folder.with_name(f"{folder.name}.checked.json").unlink(missing_ok=True)
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Cached:
    """Something in the cache.

    Attributes:
        kind: ``checkpoint``, ``interrupted``, ``scans`` or ``digests``.
        name: content key, or the folder's name.
        bytes: size of its files.
        freed: bytes that removing it frees: what no run folder shares.
        used: seconds since the epoch, when it was made or last used.
        recipe, model: of a checkpoint.
        in_run: the run folder's checkpoint that it is a link to.
    """

    kind: str
    name: str
    path: Path
    bytes: int
    freed: int
    used: float
    recipe: str = ""
    model: str = ""
    in_run: str | None = None


def entries(cache: Path | None = None) -> list[Cached]:
    """Return what the cache holds, what was used last first."""
    root = cache_root(cache)
    found = [_checkpoint(path) for path in _folders(root / "compressed")]
    found += [_plain("interrupted", path) for path in _folders(root / "work")]
    found += [_plain(kind, root / kind) for kind in _RECORDS if (root / kind).is_dir()]
    return sorted(found, key=lambda each: -each.used)


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() or path.is_symlink())


def _checkpoint(path: Path) -> Cached:
    plain = _plain("checkpoint", path)
    linked = str(path.resolve()) if path.is_symlink() else None
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        manifest = None
    size = str(manifest.recipe.get("sparsity") or manifest.recipe.get("n_layers") or "") \
        if manifest else ""  # fmt: skip
    name = str(manifest.recipe.get("name", "?")) if manifest else "damaged"
    record = path.with_name(f"{path.name}.checked.json")
    used = record.stat().st_mtime if record.is_file() else plain.used
    return Cached(
        "checkpoint",
        path.name,
        path,
        plain.bytes,
        0 if linked else plain.freed,
        used,
        f"{name} {size}".strip(),
        manifest.source.name if manifest else "",
        linked,
    )


def _plain(kind: str, path: Path) -> Cached:
    found = [each.lstat() for each in path.rglob("*") if each.is_file()]
    free = sum(each.st_size for each in found if each.st_nlink == 1)
    times = [each.st_mtime for each in found] or [path.lstat().st_mtime]
    size = sum(each.st_size for each in found)
    return Cached(kind, path.name, path, size, free, max(times))


def prune(
    cache: Path | None = None,
    *,
    unused_for: float = 0.0,
    kinds: tuple[str, ...] = ("checkpoint", "interrupted", *_RECORDS),
    dry: bool = False,
) -> list[Cached]:
    """Remove what was not used for a time; return what was, or would be, removed.

    Run folders keep their checkpoints. What another process is making stays.

    Args:
        unused_for: seconds.
        dry: only say what would be removed.

    Raises:
        CacheError: something cannot be removed.
    """
    now, gone = time.time(), []
    for each in entries(cache):
        if each.kind not in kinds or now - each.used < unused_for:
            continue
        if dry or _prune(each, cache_root(cache)):
            gone.append(each)
    return gone


def _prune(entry: Cached, root: Path) -> bool:
    locks = {
        "checkpoint": root / "compressed" / f"{entry.name}.lock",
        "interrupted": root / "locks" / f"{entry.name}.lock",
    }
    try:
        if entry.kind not in locks:
            shutil.rmtree(entry.path)
            return True
        with alone(locks[entry.kind], patience=0):
            _remove(entry.path)
    except CacheError:
        log.warning("%s stays: another process is using it.", entry.path)
        return False
    except OSError as error:
        raise CacheError(
            f"{entry.path} cannot be removed ({error.strerror}); remove the cause and try again."
        ) from None
    return True
