"""From a model and a recipe to a published checkpoint: written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from streamline_bench.core.checkpoint import (
    CheckpointReader,
    Manifest,
    read_manifest,
    resolve_pretrained,
    staged_output,
    user_cache,
    write_manifest,
)
from streamline_bench.core.manifest import Source, hash_files, update_digest
from streamline_bench.core.recipe import CalibrationSpec, Recipe
from streamline_bench.core.versions import package_versions
from streamline_bench.errors import CacheError, CheckpointError, RecipeError
from streamline_bench.methods.base import Compressed, Compression
from streamline_bench.methods.composition import write_compressed
from streamline_bench.methods.recovery import compress_and_recover, recovery_data
from streamline_bench.methods.registry import check_parameters, get_method

__all__ = ["CachedCheckpoint", "cache_root", "compress", "compress_cached", "content_key"]

log = logging.getLogger(__name__)

ALGORITHM_VERSION = 1
"""Part of every cache key; raised when the same recipe would give other weights."""

LOCK_TIMEOUT = 24 * 3600


@dataclass(frozen=True)
class CachedCheckpoint:
    """A compressed checkpoint in the cache.

    Attributes:
        path: its folder.
        reused: it was there already.
        key: content key, see :func:`content_key`.
    """

    path: Path
    reused: bool
    key: str


def cache_root(cache: Path | None = None) -> Path:
    """Return the cache folder: the argument, ``$STREAMLINE_BENCH_CACHE`` or the user's cache."""
    return Path(cache).expanduser() if cache else user_cache()


def content_key(folder: Path, recipe: Recipe) -> str:
    """Name a result by what decides it: weights, tokenizer, recipe and data (SHA-256 hex)."""
    payload = {
        "algorithm": ALGORITHM_VERSION,
        "weights": CheckpointReader(folder).fingerprint(),
        "tokenizer": _digest_files(sorted(folder.glob("tokenizer*"))),
        "recipe": recipe.content_hash(),
        "calibration": _data_identity(recipe.calibration, folder),
        "training": _data_identity(recipe.training.data, folder),
    }
    recovery = recovery_data(recipe)
    if recovery is not None:
        payload["recovery"] = _data_identity(recovery, folder)
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def compress(
    pretrained: str | Path,
    recipe: Recipe,
    output: Path,
    *,
    revision: str | None = None,
    cache: Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Compress a model into ``output``, and train the result if the recipe has a recovery.

    Args:
        pretrained: local folder or hub id of the source.
        recipe: what to do.
        output: folder to create; it appears only when it is whole.
        cache: where interrupted work is kept, so that the next call resumes it.
        device: torch device for scanning and training.
        dtype: dtype of the source model in memory; ``None`` for float32.
        overwrite: replace an existing ``output``.

    Returns:
        ``output``.

    Raises:
        StreamlineBenchError: one of its kinds, with one sentence for the user.
    """
    check_parameters(recipe)
    folder = resolve_pretrained(pretrained, revision)
    _refuse_compressed(folder)
    with staged_output(Path(output), overwrite=overwrite) as staging:
        key = content_key(folder, recipe)
        work = cache_root(cache) / "work" / key
        work.mkdir(parents=True, exist_ok=True)
        job = Compression(folder, recipe, work, device, dtype, trust_remote_code, progress)
        job.reader.check_finite(progress=progress)
        started = time.monotonic()
        method = get_method(recipe.method)
        if recipe.recovery is None:
            reader, result = job.reader, method.compress(job)
        else:
            reader, result = compress_and_recover(job, method, recipe.recovery)
        write_compressed(staging, reader, result)
        source = Source(
            name=str(pretrained), revision=revision, weights_sha256=job.reader.fingerprint()
        )
        manifest = _manifest(staging, job, result, source, time.monotonic() - started)
        write_manifest(staging, manifest)
    shutil.rmtree(work, ignore_errors=True)
    return Path(output)


def compress_cached(
    pretrained: str | Path,
    recipe: Recipe,
    *,
    revision: str | None = None,
    cache: Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> CachedCheckpoint:
    """Compress a model on first use and reuse the result afterwards.

    Processes that want the same result wait for the first one (file lock).

    Raises:
        CacheError: the cache cannot be written, or its lock is held for a day.
    """
    from filelock import FileLock, Timeout

    check_parameters(recipe)
    folder = resolve_pretrained(pretrained, revision)
    key = content_key(folder, recipe)
    target = cache_root(cache) / "compressed" / key
    if read_manifest(target) is not None:
        return CachedCheckpoint(target, True, key)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock", timeout=LOCK_TIMEOUT):
            if read_manifest(target) is not None:
                return CachedCheckpoint(target, True, key)
            compress(
                pretrained,
                recipe,
                target,
                revision=revision,
                cache=cache,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
    except Timeout:
        raise CacheError(f"{target}.lock is held by another process; stop it or wait.") from None
    except OSError as error:
        raise CacheError(
            f"The cache {target.parent} cannot be written ({error.strerror}); set "
            "STREAMLINE_BENCH_CACHE to a writable folder."
        ) from None
    return CachedCheckpoint(target, False, key)


def _refuse_compressed(folder: Path) -> None:
    manifest = read_manifest(folder)
    if manifest is not None:
        name = manifest.recipe.get("name", "?")
        raise RecipeError(
            f"{folder} is compressed already (recipe '{name}'); give the original model, "
            "or leave the recipe out."
        )


def _manifest(
    staging: Path, job: Compression, result: Compressed, source: Source, seconds: float
) -> Manifest:
    before = job.reader.num_parameters
    after = CheckpointReader(staging).num_parameters
    if after >= before and job.recipe.method != "dense":
        log.warning("the result is not smaller than the source: %d >= %d", after, before)
    return Manifest(
        source=source,
        recipe=job.recipe.model_dump(mode="json"),
        chosen=dict(result.chosen),
        parameters_before=before,
        parameters_after=after,
        layers_before=job.config.num_hidden_layers,
        layers_after=result.layers_after,
        sparsity_requested=job.recipe.sparsity,
        sparsity_reached=1 - after / before,
        calibration=dict(result.calibration),
        training=dict(result.training) if result.training else None,
        seed=job.recipe.seed,
        versions=package_versions(),
        seconds={"compress": round(seconds, 3)},
        files=hash_files(staging),
    )


def _data_identity(spec: CalibrationSpec, folder: Path) -> str:
    """Content of a local source, name of a remote one; read without tokenising anything."""
    own = folder / "calibration.jsonl"
    path = own if spec.source == "auto" and own.exists() else Path(spec.source).expanduser()
    if path.is_file():
        return _digest_files([path])
    if path.is_dir():
        return _digest_files(sorted(p for p in path.rglob("*") if p.is_file()))
    return spec.source


def _digest_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        try:
            update_digest(digest, path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from None
    return digest.hexdigest()
