"""From a model and a recipe to a published checkpoint: written whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from streamline_bench.compression.key import content_key
from streamline_bench.core.checkpoint.manifest import (
    Manifest,
    Source,
    hash_files,
    read_manifest,
    write_manifest,
)
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.files.locks import LockHeld, LockUnwritable, file_lock
from streamline_bench.core.files.staging import staged_output
from streamline_bench.core.machine.environment import package_versions, user_cache
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.errors import CacheError, RecipeError
from streamline_bench.methods.base import (
    Compressed,
    Compression,
    check_parameters,
    get_method,
    method_facts,
    write_compressed,
)
from streamline_bench.methods.recovery.recover import compress_and_recover
from streamline_bench.modeling.source_model import SourceModel

log = logging.getLogger(__name__)

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


class Named(NamedTuple):
    """What a user called the source model."""

    pretrained: str
    revision: str | None


def cache_root(cache: Path | None = None) -> Path:
    """Return the cache folder: the argument, ``$STREAMLINE_BENCH_CACHE`` or the user's cache."""
    return Path(cache).expanduser() if cache else user_cache()


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
        CacheError: the cache cannot be written.
        StreamlineBenchError: one of its kinds, with one sentence for the user.
    """
    check_parameters(recipe)
    _refuse_several_processes()
    source = SourceModel.find(
        pretrained, revision, trust_remote_code=trust_remote_code, progress=progress
    )
    name = Named(str(pretrained), revision)
    return _compress_into(
        Path(output), source, name, recipe, cache, device, dtype, overwrite, progress
    )


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

    Processes that want the same result wait for the first one (file lock). Any number of processes
    of one ``accelerate launch`` may take a result from the cache; computing one needs a single
    process.

    Raises:
        CacheError: the cache cannot be written, or its lock is held for a day.
        StreamlineBenchError: what :func:`compress` raises.
    """
    check_parameters(recipe)
    source = SourceModel.find(
        pretrained, revision, trust_remote_code=trust_remote_code, progress=progress
    )
    key = content_key(source, recipe, device=device, dtype=dtype)
    target = cache_root(cache) / "compressed" / key
    if read_manifest(target) is not None:
        return CachedCheckpoint(target, True, key)
    _refuse_several_processes()
    with _alone(target.with_name(f"{key}.lock")):
        reused = read_manifest(target) is not None
        if not reused:
            name = Named(str(pretrained), revision)
            _compress_into(target, source, name, recipe, cache, device, dtype, False, progress)
    return CachedCheckpoint(target, reused, key)


def _compress_into(
    output: Path,
    source: SourceModel,
    name: Named,
    recipe: Recipe,
    cache: Path | None,
    device: str,
    dtype: str | None,
    overwrite: bool,
    progress: bool,
) -> Path:
    _refuse_compressed(source.folder)
    with ExitStack() as lock:
        with staged_output(output, overwrite=overwrite) as staging:
            key = content_key(source, recipe, device=device, dtype=dtype)
            root = cache_root(cache)
            # Two calls that make the same share the folder in which it is resumed; held until the
            # output is published and that folder is gone.
            lock.enter_context(_alone(root / "locks" / f"{key}.lock"))
            with _scratch(root / "work" / key) as work:
                job = Compression(source, recipe, work, device, dtype, progress)
                _compress(job, staging, name)
        shutil.rmtree(work, ignore_errors=True)
    return output


def _compress(job: Compression, staging: Path, name: Named) -> None:
    """Do the work, and write its result and manifest into ``staging``."""
    job.reader.check_finite(progress=job.progress)
    for key, (own, given) in job.recipe.overridden.items():
        log.info("%s is %s and not the recipe's own %s", key, given, own)
    started = time.monotonic()
    method = get_method(job.recipe.method)
    if job.recipe.recovery is None:
        reader, result = job.reader, method.compress(job)
    else:
        reader, result = compress_and_recover(job, method, job.recipe.recovery)
    write_compressed(staging, reader, result, progress=job.progress)
    weights = job.source.weights_sha256
    source = Source(name=name.pretrained, revision=name.revision, weights_sha256=weights)
    write_manifest(staging, _manifest(staging, job, result, source, time.monotonic() - started))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a file lock; whoever wants the same waits.

    Raises:
        CacheError: it cannot be made, or another process holds it for a day.
    """
    _made(path.parent)
    try:
        with file_lock(path, patience=LOCK_TIMEOUT, waiting_for="makes the same checkpoint"):
            yield
    except LockHeld:
        raise CacheError(f"{path} is held by another process; stop it or wait.") from None
    except LockUnwritable as error:
        raise _unwritable(path.parent, error.reason) from None


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Make a folder that survives an interruption, unless nothing was left in it."""
    _made(folder)
    try:
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()  # an empty one only: what a refusal leaves


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return folder


def _unwritable(folder: Path, error: OSError | str) -> CacheError:
    reason = getattr(error, "strerror", None) or error
    return CacheError(
        f"The cache {folder} cannot be written ({reason}); set "
        "STREAMLINE_BENCH_CACHE to a writable folder."
    )


def _refuse_several_processes() -> None:
    """Of several processes one would hold the lock and wait for the others in the training."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise RecipeError(
            f"A recipe is carried out by one process, not by {processes}; run 'streamline-bench "
            "compress' without accelerate launch or torchrun, then evaluate the folder it writes."
        )


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
        method=method_facts(job.recipe.method),
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
