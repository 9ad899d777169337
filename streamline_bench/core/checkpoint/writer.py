"""Writes checkpoints: composed from tensors of another one and from new ones, shard by shard.

No model is built. Tensors of the source are copied from file to file, so that only what is new
takes memory, and of that one tensor at a time (:mod:`.shard`).

Of a quantised source, codes and scales are copied as they are. A layer of which a method changes
some weights is written plain as a whole, and the config names its modules as not quantised. Where
no codes are left, or the format has no list for that, all is written plain.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from streamline_bench.core.architecture import Architecture, architecture_of
from streamline_bench.core.checkpoint.folder import (
    INDEX_NAME,
    SINGLE_NAME,
    TensorEntry,
    is_confined,
)
from streamline_bench.core.checkpoint.quantization import (
    MODELOPT_NAME,
    with_exceptions,
    without_settings,
)
from streamline_bench.core.checkpoint.reader import CheckpointReader, byte_bar
from streamline_bench.core.checkpoint.shard import Part, append_tensor, write_shard
from streamline_bench.core.checkpoint.wrapper import Wrapper
from streamline_bench.core.files import sync_path
from streamline_bench.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

NOT_COPIED = (
    "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack",
    "*.gguf", "*.onnx", "config.json", "streamline.json", "README*", ".*",
)  # fmt: skip
"""Weights, what is written anew, and the model card, which describes another model."""

_LARGEST_COPY = 256 * 2**20  # no tokenizer is larger; what is, holds weights in some other format
_IN_LAYER = re.compile(r"((?:.+?\.)?(?:layers|h|blocks)\.\d+)\.(.+)")
_COPIED_FOLDERS = ("additional_chat_templates",)


class LazyTensors(Mapping[str, "torch.Tensor"]):
    """Tensors by name, made anew on each access, so that one at a time takes memory.

    Args:
        names: in order.
        make: name -> tensor.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], torch.Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def layers_prefix(reader: CheckpointReader, architecture: Architecture) -> str:
    """Return the path of the layers as this checkpoint spells it.

    Checkpoints saved from the model without its head lack the first part (``h.0.…`` instead of
    ``transformer.h.0.…``).

    Raises:
        CheckpointError: there are no layers under either name.
    """
    path = architecture.layers
    bare = path.removeprefix(f"{architecture.base}.")
    for prefix in (path, architecture.stored_path(path), bare):
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
    progress: bool = True,
    digests: dict[str, str] | None = None,
) -> bool:
    """Write a checkpoint into an existing folder; when it returns, every file is on disk.

    Tokenizer, generation config, chat templates, licence and the like are copied
    (:func:`copied_files`). Into a multimodal folder the text model is put back (see
    :mod:`.wrapper`).

    The files appear one by one: build in a folder of :func:`.files.staged_output`.

    Args:
        reader: the source checkpoint.
        output_folder: empty folder (see ``staged_output``).
        config: content of the new ``config.json``.
        names: new tensor name -> name in the source.
        extra: new tensors; their names must not be in ``names``. One at a time is held where they
            are made on access (:class:`LazyTensors`).
        max_shard_bytes: size at which a new shard begins.
        digests: gets file name -> SHA-256 (hex) of the files of weights, hashed as they are
            written.

    Returns:
        Whether all weights are plain: settings of quantisation must not be added.

    Raises:
        CheckpointError: a named tensor is not in the source, or a source file changes meanwhile.
        OutputError: the output cannot be written.
    """
    extra = extra or {}
    double = sorted(names.keys() & extra.keys())
    if double:
        raise CheckpointError(f"Tensor '{double[0]}' is both copied and given anew.")
    config, names, extra = _plain_where_changed(reader, config, names, extra)
    without = _settings_file(reader, names)
    names = _file_names(reader, names)
    if reader.wrapper is not None:
        config, names, extra = _wrapped(reader.wrapper, config, names, extra)
    total = sum(reader.files[old].nbytes for old in names.values())
    order = {name: number for number, name in enumerate(reader.files)}
    copied = sorted(names.items(), key=lambda item: order[item[1]])
    bar = byte_bar("Writing weights", total, progress)
    shards = _Shards(output_folder, max_shard_bytes, bar, hashed=digests is not None)
    try:
        _write_json(output_folder / "config.json", dict(config))
        with bar:
            for new, old in copied:
                shards.add(new, reader.in_place(old), held=True)
            for new in extra:
                shards.add(new, extra[new], held=isinstance(extra, dict))
            found = shards.close()
        if digests is not None:
            digests.update(found)
        _copy(reader.folder, output_folder, without=without)
        sync_path(output_folder)
    except OSError as error:
        raise OutputError(
            f"Output {output_folder} cannot be written ({error.strerror or error}); free space or "
            "give another --output."
        ) from error
    finally:
        shards.abandon()
    return bool(without)


def _wrapped(
    wrapper: Wrapper,
    config: Mapping[str, Any],
    names: Mapping[str, str],
    extra: Mapping[str, torch.Tensor],
) -> tuple[dict[str, Any], dict[str, str], Mapping[str, torch.Tensor]]:
    """Return config, copied names and new tensors of the text model as its folder has them."""
    inside = {key: name for name, key in wrapper.stored.items()}
    wrapper.warn_of_taps(
        {new: inside[key] for new, key in names.items()}, architecture_of(wrapper.text_json).layers
    )
    copied = {name: name for name in wrapper.outer}
    copied |= {wrapper.stored_name(new): key for new, key in names.items()}
    fresh = {wrapper.stored_name(name): name for name in extra}
    return wrapper.written(config), copied, LazyTensors(fresh, lambda name: extra[fresh[name]])


def _plain_where_changed(
    reader: CheckpointReader,
    config: Mapping[str, Any],
    names: Mapping[str, str],
    extra: Mapping[str, torch.Tensor],
) -> tuple[Mapping[str, Any], Mapping[str, str], Mapping[str, torch.Tensor]]:
    """Return config, names and tensors in which no layer is partly of codes and partly changed.

    Raises:
        CheckpointError: weights change and the source's codes cannot be decoded.
    """
    found = reader.quantisation
    if found is None or not found.stored or not (extra or _mixed_layers(names)):
        return config, names, extra
    reader.refuse_quantised("weights would be changed")
    inside = {_split(name)[1]: len(entry.shape) for name, entry in reader.entries.items()}
    replaced = {layer for layer, rest in map(_split, extra) if layer and rest in inside}
    replaced |= _mixed_layers(names)
    coded = {new: old for new, old in names.items() if old in reader.coded}
    decoded = {new: old for new, old in coded.items() if _split(new)[0] in replaced}
    if len(decoded) == len(coded) or found.exceptions is None:
        if len(decoded) < len(coded):
            log.warning(
                "The result is written without quantisation: the settings of '%s' cannot name "
                "single layers that are not quantised.", found.method,
            )  # fmt: skip
        decoded, config = coded, without_settings(config)
    else:
        given = [*extra, *(new for new in names if _split(new)[0] in replaced)]
        # Weights of modules have two dimensions or more; what is new in a layer counts as one.
        weights = [name for name in given if inside.get(_split(name)[1], 2) > 1]
        config = with_exceptions(config, found.exceptions, _modules(weights))
    new = LazyTensors(
        (*decoded, *extra), lambda n: reader.tensor(decoded[n]) if n in decoded else extra[n]
    )
    return config, {n: old for n, old in names.items() if n not in decoded}, new


def _mixed_layers(names: Mapping[str, str]) -> set[str]:
    """Return the layers whose tensors come from several layers of the source."""
    origins: dict[str, set[str]] = defaultdict(set)
    for new, old in names.items():
        origins[_split(new)[0]].add(_split(old)[0])
    return {layer for layer, several in origins.items() if layer and len(several) > 1}


def _split(name: str) -> tuple[str, str]:
    """Return the path of the layer that a tensor lies in, empty outside, and the name in it."""
    found = _IN_LAYER.match(name)
    return (found[1], found[2]) if found else ("", name)


def _modules(names: Iterable[str]) -> list[str]:
    """Return the modules of weights, those of all experts of a layer as well."""
    found: dict[str, None] = {}
    for name in names:
        module = name.rpartition(".")[0]
        experts, dot, _ = module.partition(".experts.")
        found |= {f"{experts}.experts": None} if dot else {}
        found[module] = None
    return list(found)


def _file_names(reader: CheckpointReader, names: Mapping[str, str]) -> dict[str, str]:
    """Return new name -> name in the source's files, of all tensors that hold those in ``names``.

    Codes and scales follow the module of their weight.
    """
    stored: dict[str, str] = {}
    for new, old in names.items():
        reader.entry(old)
        parts = reader.stored_parts(old)
        if parts == (old,):
            stored[new] = reader.file_name(old)
            continue
        module, target = old.rpartition(".")[0], new.rpartition(".")[0]
        stored |= {target + part[len(module) :]: reader.file_name(part) for part in parts}
    return stored


def _settings_file(reader: CheckpointReader, names: Mapping[str, str]) -> tuple[str, ...]:
    """Return the file with quantisation settings where no codes are written."""
    found = reader.quantisation
    coded = (
        found is not None
        and found.stored
        and (not reader.coded or any(old in reader.coded for old in names.values()))
    )
    return () if coded else (MODELOPT_NAME,)


def copied_files(folder: Path) -> list[Path]:
    """Return the files that are copied with the weights, relative to ``folder``.

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


class _Shards:
    """Fills shards in the order in which tensors come, and writes each when it is full.

    A tensor larger than a shard gets one of its own. What is made on access goes to a file next to
    the shards until its shard is written: its place is known only when all of them are.
    """

    def __init__(self, folder: Path, max_bytes: float, bar: tqdm[Any], hashed: bool) -> None:
        self._folder, self._max_bytes, self._bar, self._hashed = folder, max_bytes, bar, hashed
        self._made = folder / ".made.bin"
        self._flusher = ThreadPoolExecutor(1)  # one shard reaches the disk while the next is made
        self._flushed: list[Future[None]] = []
        self._parts: list[Part] = []
        self._filled = self._total = 0
        self._weight_map: dict[str, int] = {}
        self._written: list[tuple[Path, str]] = []

    def add(self, name: str, source: TensorEntry | torch.Tensor, *, held: bool) -> None:
        """Add a tensor; ``held``: somebody else keeps it in memory anyway."""
        part = Part.of(name, source)
        if self._parts and self._filled + part.nbytes > self._max_bytes:
            self._write()
        if not held:
            size = self._made.stat().st_size if self._made.exists() else 0
            append_tensor(self._made, part)
            entry = TensorEntry(name, self._made, part.dtype, part.shape, offset=size)
            part = Part.of(name, entry)
        self._parts.append(part)
        self._filled += part.nbytes

    def _write(self) -> None:
        path = self._folder / f".{len(self._written)}.safetensors"
        # transformers refuses files that do not say which framework's layout they have.
        digest = write_shard(
            path, self._parts, metadata={"format": "pt"}, hashed=self._hashed,
            advance=self._bar.update,
        )  # fmt: skip
        self._weight_map.update(dict.fromkeys((p.name for p in self._parts), len(self._written)))
        self._total += self._filled
        self._written.append((path, digest))
        self._flushed.append(self._flusher.submit(sync_path, path))
        self._parts, self._filled = [], 0
        self._made.unlink(missing_ok=True)

    def close(self) -> dict[str, str]:
        """Write the last shard and the index; return file name -> SHA-256."""
        self._write()
        for future in self._flushed:
            future.result()
        names = [SINGLE_NAME]
        if len(self._written) > 1:
            count = len(self._written)
            names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
            placed = {name: names[number] for name, number in sorted(self._weight_map.items())}
            index = {"metadata": {"total_size": self._total}, "weight_map": placed}
            _write_json(self._folder / INDEX_NAME, index)
        for (path, _), name in zip(self._written, names, strict=True):
            path.rename(self._folder / name)
        return dict(zip(names, (digest for _, digest in self._written), strict=True))

    def abandon(self) -> None:
        """Let go of threads and of what was made."""
        self._flusher.shutdown()
        self._made.unlink(missing_ok=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    sync_path(path)


def _copy(source: Path, target: Path, without: Sequence[str]) -> None:
    for name in copied_files(source):
        if name.as_posix() in without:
            continue
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
        sync_path(target / name)
