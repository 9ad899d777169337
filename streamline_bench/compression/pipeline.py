"""From a model and a recipe to a published checkpoint: written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamline_bench.compression.cache import (
    alone,
    cache_root,
    cached_folder,
    find_cached,
    is_whole,
    make_folder,
    share,
    take,
)
from streamline_bench.compression.placement import (
    Placement,
    decide_placement,
    decision_table,
    refuse_placement,
    within_memory,
)
from streamline_bench.core.architecture import depth_of
from streamline_bench.core.checkpoint.folder import (
    Manifest,
    Source,
    hash_files,
    read_manifest,
    tokenizer_files,
    write_manifest,
)
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.corpora import SELF, local_paths
from streamline_bench.core.data.corpus_files import file_kind
from streamline_bench.core.data.own_texts import SELF_VERSION
from streamline_bench.core.files import staged_output
from streamline_bench.core.machine.environment import package_versions
from streamline_bench.core.machine.ranks import current, joined, launched, own_device
from streamline_bench.core.recipe.schema import CalibrationSpec, Recipe
from streamline_bench.core.training.trainer import training_version
from streamline_bench.errors import CacheError, RecipeError
from streamline_bench.methods.base import (
    Compressed,
    Compression,
    check_parameters,
    facts_of_methods,
    get_method,
    write_compressed,
)
from streamline_bench.modeling.loading import SourceModel, computing_dtype

log = logging.getLogger(__name__)

SHARED_VERSION = 4
"""Part of every key; raised when what all methods share gives other tensors for the same recipe:
calibration text, the scan, how tensors are composed and stored. Changes of one method raise its
``Method.version``, of training ``TRAINING_VERSION``, of recovery ``RECOVERY_VERSION``."""


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


def compress(
    pretrained: str | Path,
    recipe: Recipe,
    output: Path,
    *,
    revision: str | None = None,
    cache: Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    placement: Placement = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    states: Path | None = None,
    memory: int | None = None,
) -> Path:
    """Compress a model into ``output``, and train the result if the recipe has a recovery.

    Processes that ``accelerate launch`` or ``torchrun`` started share the sequences of a training;
    all else is done, and written, by the main one, for which the others wait.

    Args:
        pretrained: local folder or hub id of the source.
        recipe: what to do.
        output: folder to create; it appears only when it is whole.
        cache: where interrupted work is kept, so that the next call resumes it.
        device: torch device for scanning and training.
        dtype: dtype of the source model in memory; None or ``auto`` for that of the checkpoint on
            an accelerator and float32 on a CPU.
        placement: of its weights, see :data:`.placement.Placement`; the result is the same.
        overwrite: replace an existing ``output``.
        states: folder of hidden states that other calls want as well: the first one to train on
            them fills it, and the caller deletes it; None: they are not shared.
        memory: bytes of this machine's memory that it may take; None: all that is free.

    Returns:
        ``output``.

    Raises:
        CacheError: the cache cannot be written.
        StreamlineBenchError: one of its kinds, with one sentence for the user.
    """
    check_parameters(recipe)
    refuse_placement(placement, recipe)

    def find() -> SourceModel:
        source = SourceModel.find(
            pretrained, revision, trust_remote_code=trust_remote_code,
            progress=progress and current().main, changed=recipe.method != "dense",
        )  # fmt: skip
        _refuse_other_text(source, recipe)
        return source

    def into(source: SourceModel) -> Path:
        own = own_device(device)
        return _compress_into(
            Path(output),
            source,
            recipe,
            cache,
            own,
            dtype,
            placement,
            overwrite,
            states,
            memory,
        )

    with joined(device) as ranks:
        if trains(recipe):
            return into(ranks.in_turn(find))
        return ranks.first(lambda: into(find()))


def explained(
    pretrained: str | Path,
    recipe: Recipe,
    *,
    revision: str | None = None,
    cache: Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    placement: Placement = "auto",
    trust_remote_code: bool = False,
) -> str:
    """Return in words which placement :func:`compress` would take, and why; nothing is loaded.

    Raises:
        ResourceError: the memory suffices for none.
        StreamlineBenchError: one of its kinds, with one sentence for the user.
    """
    check_parameters(recipe)
    refuse_placement(placement, recipe)
    source = SourceModel.find(
        pretrained, revision, trust_remote_code=trust_remote_code, changed=recipe.method != "dense"
    )
    dtype = computing_dtype(dtype, device, source.reader)
    decided = decide_placement(placement, source, recipe, device, dtype, cache_root(cache) / "work")
    return decision_table(decided, recipe, device, dtype)


def compress_cached(
    pretrained: str | Path,
    recipe: Recipe,
    *,
    revision: str | None = None,
    cache: Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    placement: Placement = "auto",
    trust_remote_code: bool = False,
    progress: bool = True,
) -> CachedCheckpoint:
    """Compress a model on first use and reuse the result afterwards.

    Processes that want the same result wait for the first one (file lock), and so do the processes
    of one ``accelerate launch``: one of each machine makes it, the others wait.

    Raises:
        CacheError: the cache cannot be written, or its lock is held for a day.
        StreamlineBenchError: what :func:`compress` raises.
    """
    check_parameters(recipe)
    refuse_placement(placement, recipe)
    source = SourceModel.find(
        pretrained, revision, trust_remote_code=trust_remote_code, progress=progress,
        changed=recipe.method != "dense",
    )  # fmt: skip
    _refuse_other_text(source, recipe)
    key = content_key(source, recipe, device=device, dtype=dtype)
    target = cached_folder(key, cache)
    if is_whole(target):
        return CachedCheckpoint(target, True, key)
    with alone(target.with_name(f"{key}.lock")):
        reused = find_cached(key, cache) is not None
        if not reused:
            _compress_into(target, source, recipe, cache, device, dtype, placement, overwrite=False)
    return CachedCheckpoint(target, reused, key)


def compress_shared(
    pretrained: str | Path,
    recipe: Recipe,
    output: Path,
    *,
    revision: str | None = None,
    work: Path,
    device: str = "cpu",
    dtype: str | None = None,
    placement: Placement = "auto",
    trust_remote_code: bool = False,
    progress: bool = True,
    states: Path | None = None,
    memory: int | None = None,
    make: Callable[[], object] | None = None,
) -> bool:
    """Take a checkpoint from the cache into ``output``, or make it there and share it.

    Args:
        output: replaced if it is there.
        work: where interrupted work is kept, so that the next call resumes it.
        states, memory: as for :func:`compress`.
        make: makes ``output`` in processes of its own, by :func:`compress`; None: it is made here.

    Returns:
        Whether it was in the cache.

    Raises:
        StreamlineBenchError: what :func:`compress` raises.
    """
    check_parameters(recipe)
    refuse_placement(placement, recipe)
    _refuse_several_processes()
    source = SourceModel.find(
        pretrained, revision, trust_remote_code=trust_remote_code, progress=progress
    )
    recipe = recipe.computed_on(device, computing_dtype(dtype, device, source.reader))
    key = content_key(source, recipe, device=device, dtype=dtype)
    with ExitStack() as stack:
        shared = True
        try:
            lock = cached_folder(key).with_name(f"{key}.lock")
            stack.enter_context(alone(lock))
        except CacheError as error:
            log.warning("The result is not shared with other runs: %s", error)
            shared = False
        if shared and (found := find_cached(key)) is not None:
            take(found, output, recipe.model_dump(mode="json"))
            return True
        if make is None:
            _compress_into(
                Path(output), source, recipe, work, device, dtype, placement, True, states, memory
            )
        else:
            make()
        if shared:
            share(Path(output), key)
    return False


def _compress_into(
    output: Path,
    source: SourceModel,
    recipe: Recipe,
    cache: Path | None,
    device: str,
    dtype: str | None,
    placement: Placement,
    overwrite: bool,
    states: Path | None = None,
    memory: int | None = None,
) -> Path:
    _refuse_compressed(source.folder)
    asked, dtype = dtype, computing_dtype(dtype, device, source.reader)
    log.info("dtype: %s on %s (%s)", dtype, device, "auto" if asked is None else asked)
    recipe = recipe.computed_on(device, dtype)
    first = current().first  # what is opened here is the main process's, for all
    with ExitStack() as lock:
        with ExitStack() as folders:
            staged = staged_output(output, overwrite=overwrite)
            staging = first(lambda: folders.enter_context(staged))
            key = first(lambda: content_key(source, recipe, device=device, dtype=dtype))
            root = cache_root(cache)
            # Two calls that make the same share the folder in which it is resumed; held until the
            # output is published and that folder is gone.
            first(lambda: lock.enter_context(alone(root / "locks" / f"{key}.lock")))
            work = first(lambda: folders.enter_context(_scratch(root / "work" / key)))
            decided = first(
                lambda: decide_placement(
                    placement, source, recipe, device, dtype, work, _bytes_in(work), memory
                )
            )
            job = Compression(
                source, recipe, work, device, dtype, source.progress, decided.streamed,
                scans=root / "scans" / _scan_key(source, device, dtype),
                at_once=decided.forecast.at_once, states=states,
            )  # fmt: skip
            with within_memory(decided, device):
                _compress(job, staging)
        if current().main:
            shutil.rmtree(work, ignore_errors=True)
    return output


def _compress(job: Compression, staging: Path) -> None:
    """Do the work, and write its result and manifest into ``staging``."""
    current().first(lambda: job.reader.check_finite(progress=job.progress))
    for key, (own, given) in job.recipe.overridden.items():
        log.info("%s is %s and not the recipe's own %s", key, given, own)
    started = time.monotonic()
    method = get_method(job.recipe.method)
    if job.recipe.recovery is None:
        reader, result = job.reader, method.compress(job)
    else:
        from streamline_bench.methods.recovery.recover import compress_and_recover

        reader, result = compress_and_recover(job, method, job.recipe.recovery)
    if not current().main:
        return
    written = write_compressed(staging, reader, result, progress=job.progress)
    files = hash_files(staging, written)
    write_manifest(staging, _manifest(staging, job, result, files, time.monotonic() - started))


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Make a folder that survives an interruption, unless nothing was left in it."""
    make_folder(folder)
    try:
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()  # an empty one only: what a refusal leaves


def _bytes_in(folder: Path) -> int:
    """Return what the files below a folder take up on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def trains(recipe: Recipe) -> bool:
    """Whether something is trained, which several processes share."""
    return recipe.trains_replacement or recipe.recovery is not None


def _refuse_several_processes() -> None:
    """A comparison runs its jobs itself."""
    processes = launched().count
    if processes != 1:
        raise RecipeError(
            f"A job of a comparison is started as one process, not {processes}; run "
            "'streamline-bench compare' without accelerate launch or torchrun, and give "
            "--gpus-per-job."
        )


def _refuse_compressed(folder: Path) -> None:
    manifest = read_manifest(folder)
    if manifest is not None:
        name = manifest.recipe.get("name", "?")
        raise RecipeError(
            f"{folder} is compressed already (recipe '{name}'); give the original model, "
            "or leave the recipe out."
        )


def _refuse_other_text(source: SourceModel, recipe: Recipe) -> None:
    """Refuse, before anything costly, a result that a multimodal folder cannot hold."""
    wrapper, method = source.reader.wrapper, get_method(recipe.method)
    if wrapper is None:
        return
    if not method.keeps_stream:
        wrapper.refuse_other_stream()
    if not method.stock(recipe):
        wrapper.require_text_type("streamline")


def _manifest(
    staging: Path, job: Compression, result: Compressed, files: dict[str, str], seconds: float
) -> Manifest:
    before, result_reader = job.reader.num_parameters, CheckpointReader(staging)
    after = result_reader.num_parameters
    if after >= before and job.recipe.method != "dense":
        log.warning("the result is not smaller than the source: %d >= %d", after, before)
    return Manifest(
        source=Source(
            name=job.source.name,
            revision=job.source.revision,
            weights_sha256=job.source.weights_sha256,
        ),
        recipe=job.recipe.model_dump(mode="json"),
        method=facts_of_methods(job.recipe),
        chosen=dict(result.chosen),
        parameters_before=before,
        parameters_after=after,
        layers_before=depth_of(job.config),
        layers_after=result.layers_after,
        sparsity_requested=job.recipe.sparsity,
        sparsity_reached=1 - after / before,
        whole_folder=_whole_folder(job.reader, result_reader),
        calibration=dict(result.calibration),
        training=dict(result.training) if result.training else None,
        seed=job.recipe.seed,
        versions=package_versions(),
        seconds={"compress": round(seconds, 3)},
        files=files,
    )


def _whole_folder(before: CheckpointReader, after: CheckpointReader) -> dict[str, Any] | None:
    """Sizes of a multimodal folder; those of the manifest itself are its text model's."""
    if before.wrapper is None:
        return None
    counts = [reader.num_parameters + reader.num_outer for reader in (before, after)]
    return {
        "model_type": before.wrapper.model_type,
        "parameters_before": counts[0],
        "parameters_after": counts[1],
        "sparsity_reached": 1 - counts[1] / counts[0],
    }


def content_key(
    source: SourceModel, recipe: Recipe, *, device: str = "cpu", dtype: str | None = None
) -> str:
    """Return a SHA-256 (hex) of weights, tokenizer, recipe, data, method and computation.

    Args:
        device: that computes; only its type counts (``cuda:1`` gives the same as ``cuda``).
        dtype: of the source model in memory; None or ``auto`` as for :func:`compress`.

    Raises:
        RecipeError: there is no such dtype.
        CheckpointError: a file cannot be read.
    """
    folder = source.folder
    kind = computing_dtype(dtype, device, source.reader)
    recipe = recipe.computed_on(device, kind)
    payload = {
        "shared": SHARED_VERSION,
        "method": facts_of_methods(recipe),
        "weights": source.weights_sha256,
        # Where generation stops is stored with the tokenizer, and copied into the result.
        "tokenizer": _digests(
            source, folder, [*tokenizer_files(folder), *folder.glob("generation_config.json")]
        ),
        "recipe": recipe.content_hash(),
        "calibration": _data_identity(recipe.calibration, source),
        "training": _data_identity(recipe.training.data, source),
        "device": device.partition(":")[0],
        "dtype": kind,
    }
    if files := get_method(recipe.method).files(recipe.parameters):
        payload["files"] = [[path.name, source.file_sha256(path)] for path in files]
    if recipe.replacement.kind != "none":
        payload["training_version"] = training_version(device)
    if recipe.recovery is not None and recipe.recovery_data is not None:
        from streamline_bench.methods.recovery.recover import recovery_version

        version = recovery_version(recipe.recovery, kind)
        payload["recovery"] = _data_identity(recipe.recovery_data, source)
        payload["recovery_version"] = [training_version(device), version]
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def _scan_key(source: SourceModel, device: str, dtype: str | None) -> str:
    """Hash what a scan depends on beside its tokens."""
    kind = computing_dtype(dtype, device, source.reader)
    parts = [SHARED_VERSION, source.weights_sha256, device.partition(":")[0], kind]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _data_identity(spec: CalibrationSpec, source: SourceModel) -> str | dict[str, str]:
    """Content of a local source, name of a remote one; read without tokenising anything."""
    if spec.source == SELF:
        return f"{SELF} {SELF_VERSION}"  # written by the weights and tokenizer of the key
    paths = local_paths(spec.source, source.folder)
    if len(paths) == 1 and paths[0].is_dir():
        return _digests(source, paths[0], sorted(p for p in paths[0].rglob("*") if p.is_file()))
    if not paths or not all(path.is_file() and file_kind(path) for path in paths):
        return spec.source  # on the hub; or not to be read, as its reader will say
    if len(paths) == 1:
        return _digests(source, paths[0].parent, paths)
    return {f"{n} {path.name}": source.file_sha256(path) for n, path in enumerate(paths)}


def _digests(source: SourceModel, root: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 (hex) of files, by path below ``root``."""
    return {path.relative_to(root).as_posix(): source.file_sha256(path) for path in paths}
