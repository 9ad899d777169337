"""Surgery on files: builds a checkpoint from byte ranges of another one.

No model is built and no tensor is loaded; bytes go from file to file, whatever their dtype, so
that memory stays the same for any size of model. torch is imported only if tensors from memory
are written along.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tqdm import tqdm

from streamline_bench.core.architecture import Architecture
from streamline_bench.core.checkpoint.byte_copy import copy_range
from streamline_bench.core.checkpoint.reader import INDEX_NAME, CheckpointReader, is_confined
from streamline_bench.core.checkpoint.shard_layout import (
    ByteRange,
    NewTensor,
    byte_ranges,
    header_bytes,
    shard_names,
    split_shards,
)
from streamline_bench.core.files.staging import sync_path
from streamline_bench.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    import torch

__all__ = ["compose", "copied_files", "layer_dtype", "layer_names", "layers_prefix"]

NOT_COPIED = (
    "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack",
    "*.gguf", "*.onnx", "config.json", "streamline.json", "README*", ".*",
)  # fmt: skip
"""Weights, what is written anew, and the model card, which describes another model."""

_LARGEST_COPY = 256 * 2**20  # no tokenizer is larger; what is, holds weights in some other format
_COPIED_FOLDERS = ("additional_chat_templates",)


def layers_prefix(reader: CheckpointReader, architecture: Architecture) -> str:
    """Return the path of the layers as this checkpoint spells it.

    Checkpoints saved from the model without its head lack the first part (``h.0.…`` instead of
    ``transformer.h.0.…``).

    Raises:
        CheckpointError: there are no layers under either name.
    """
    bare = architecture.layers.removeprefix(f"{architecture.base}.")
    for prefix in (architecture.layers, bare):
        if any(name.startswith(f"{prefix}.0.") for name in reader.names):
            return prefix
    raise CheckpointError(
        f"{reader.folder} has no tensors named '{architecture.layers}.0.…', as a checkpoint of "
        f"model type '{architecture.model_type}' should; save it again with save_pretrained."
    )


def layer_dtype(reader: CheckpointReader, architecture: Architecture, layer: int) -> torch.dtype:
    """Return the dtype in which weights that join or replace a layer are stored.

    It is that of the layer's largest tensor, a matrix (norms are kept in float32 by some);
    float32 where that is neither bfloat16 nor float16.
    """
    import torch

    start = f"{layers_prefix(reader, architecture)}.{layer}."
    entries = [reader.entry(name) for name in reader.names if name.startswith(start)]
    stored = max(entries, key=lambda entry: entry.numel).dtype
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored, torch.float32)


def layer_names(
    reader: CheckpointReader, architecture: Architecture, keep: Sequence[int]
) -> dict[str, str]:
    """Return new tensor name -> old one for the checkpoint with only the layers in ``keep``.

    Layers are renumbered, everything outside them keeps its name. Layers beyond the decoder
    (multi-token prediction) are left out: they were trained on the last layers' output.

    Raises:
        CheckpointError: a layer in ``keep`` has no tensors.
    """
    prefix = layers_prefix(reader, architecture)
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.(.+)")
    position = {old: new for new, old in enumerate(keep)}
    names: dict[str, str] = {}
    found: set[int] = set()
    for name in reader.names:
        match = pattern.fullmatch(name)
        if match is None:
            names[name] = name
        elif int(match[1]) in position:
            found.add(int(match[1]))
            names[f"{prefix}.{position[int(match[1])]}.{match[2]}"] = name
    missing = sorted(position.keys() - found)
    if missing:
        raise CheckpointError(f"{reader.folder} has no tensors of layer {missing[0]}.")
    return names


def compose(
    reader: CheckpointReader,
    output_folder: Path,
    *,
    config: Mapping[str, Any],
    names: Mapping[str, str],
    extra: Mapping[str, torch.Tensor] | None = None,
    max_shard_bytes: float = 5e9,
    copy_files: bool = True,
    progress: bool = True,
) -> None:
    """Write a checkpoint into an existing folder; when it returns, every file is on disk.

    The files appear one by one: build in a folder of :func:`.staging.staged_output`.

    Args:
        reader: the source checkpoint.
        output_folder: empty folder (see ``staged_output``).
        config: content of the new ``config.json``.
        names: new tensor name -> name in the source.
        extra: new tensors from memory; their names must not be in ``names``.
        max_shard_bytes: size at which a new shard begins.
        copy_files: copy tokenizer, generation config, chat templates, licence and the like
            (see :func:`copied_files`).

    Raises:
        CheckpointError: a named tensor is not in the source, or a source file shrinks meanwhile.
        OutputError: the output cannot be written.
    """
    extra = extra or {}
    shards = split_shards(_plan(reader, names, extra), max_shard_bytes)
    files = shard_names(len(shards))
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc="Writing weights", delay=2,
        disable=not progress,
    )  # fmt: skip
    try:
        # One shard reaches the disk while the next one is copied.
        with bar, ThreadPoolExecutor(1) as flusher:
            flushed = []
            for file, shard in zip(files, shards, strict=True):
                _write_shard(output_folder / file, shard, extra, bar)
                flushed.append(flusher.submit(sync_path, output_folder / file))
            if copy_files:
                _copy(reader.folder, output_folder)
            if len(files) > 1:
                _write_json(output_folder / INDEX_NAME, _index(files, shards, total))
            _write_json(output_folder / "config.json", dict(config))
            for future in flushed:
                future.result()
        sync_path(output_folder)
    except OSError as error:
        raise OutputError(
            f"Output {output_folder} cannot be written ({error.strerror or error}); free space or "
            "give another --output."
        ) from error


def copied_files(folder: Path) -> list[Path]:
    """Return the files that go along with the weights, relative to ``folder``.

    All small files of the folder itself and its chat templates, without those in ``NOT_COPIED``.

    Raises:
        CheckpointError: one is a link to somewhere outside the folder.
    """
    chosen = [
        path
        for root in (folder, *(folder / name for name in _COPIED_FOLDERS))
        if root.is_dir()
        for path in sorted(root.iterdir())
        if path.is_file()
        and not any(fnmatch(path.name, pattern) for pattern in NOT_COPIED)
        and path.stat().st_size <= _LARGEST_COPY
    ]
    for path in chosen:
        if not is_confined(folder, path):
            raise CheckpointError(
                f"{path} is a link to {path.resolve()}, outside the model's folder; copy the file "
                "itself into the folder."
            )
    return [path.relative_to(folder) for path in chosen]


def _plan(
    reader: CheckpointReader, names: Mapping[str, str], extra: Mapping[str, torch.Tensor]
) -> list[NewTensor]:
    double = sorted(names.keys() & extra.keys())
    if double:
        raise CheckpointError(f"Tensor '{double[0]}' is both copied and given anew.")
    order = {name: number for number, name in enumerate(reader.names)}
    copied = []
    # Source order, so that neighbours stay neighbours and are copied in one go.
    for new, old in sorted(names.items(), key=lambda item: order.get(item[1], -1)):
        entry = reader.entry(old)
        copied.append(NewTensor(new, entry.dtype, entry.shape, entry.nbytes, entry))
    if not extra:
        return copied
    from streamline_bench.core.checkpoint.tensor_view import described

    return copied + [NewTensor(name, *described(name, t)) for name, t in extra.items()]


def _write_shard(
    path: Path, tensors: list[NewTensor], extra: Mapping[str, torch.Tensor], bar: tqdm[Any]
) -> None:
    with path.open("xb") as file, _sources() as descriptor:
        file.write(header_bytes(tensors))
        file.flush()
        for piece in byte_ranges(tensors):
            if piece.source is None:
                _write_memory(file, extra[piece.name], bar)
            else:
                _copy_piece(file, piece, descriptor(piece.source.shard), bar)


def _copy_piece(file: BinaryIO, piece: ByteRange, source: int, bar: tqdm[Any]) -> None:
    copied = copy_range(source, file.fileno(), piece.begin, piece.end, bar.update)
    if copied != piece.end - piece.begin and piece.source is not None:
        raise CheckpointError(
            f"{piece.source.shard} became shorter while it was copied; start again with files "
            "that nobody changes."
        )


def _write_memory(file: BinaryIO, tensor: torch.Tensor, bar: tqdm[Any]) -> None:
    from streamline_bench.core.checkpoint.tensor_view import raw_bytes

    data = raw_bytes(tensor)
    file.write(data)
    file.flush()  # the next piece goes past Python's buffer
    bar.update(len(data))


@contextmanager
def _sources() -> Iterator[Any]:
    """Yield a function path -> open descriptor; all are closed at the end."""
    with ExitStack() as stack:
        opened: dict[Path, int] = {}

        def descriptor(path: Path) -> int:
            if path not in opened:
                opened[path] = stack.enter_context(path.open("rb")).fileno()
            return opened[path]

        yield descriptor


def _index(files: list[str], shards: list[list[NewTensor]], total: int) -> dict[str, Any]:
    weight_map = {t.name: file for file, shard in zip(files, shards, strict=True) for t in shard}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    sync_path(path)


def _copy(source: Path, target: Path) -> None:
    for name in copied_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
        sync_path(target / name)
