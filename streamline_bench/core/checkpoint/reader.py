"""Reads checkpoints: single tensors without loading the rest, and hashes that name the content.

A quantised checkpoint is read as the plain one that it stands for: names, shapes and tensors are
those of the weights; codes and scales are seen by what copies or hashes bytes only.

The safetensors library maps the files. Whether they hold what the index promises is checked when
they are opened (:func:`.folder.read_entries`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from streamline_bench.core.architecture import Architecture, architecture_of, config_entry
from streamline_bench.core.checkpoint.codes import CodedWeight, coded_weights
from streamline_bench.core.checkpoint.folder import (
    DTYPES,
    TensorEntry,
    open_shard,
    read_config,
    read_entries,
)
from streamline_bench.core.checkpoint.quantization import (
    Quantisation,
    is_code,
    is_scale,
    quantisation_of,
)
from streamline_bench.core.checkpoint.shard import file_pieces
from streamline_bench.core.checkpoint.wrapper import wrapper_of
from streamline_bench.core.files import atomic_write_text
from streamline_bench.core.machine.environment import user_cache
from streamline_bench.errors import (
    ArchitectureError,
    CheckpointError,
    NumericsError,
    OutputError,
    library_errors,
)

if TYPE_CHECKING:
    import torch

_NOTES = {"_name_or_path", "transformers_version", "use_cache", "_commit_hash"}
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class CheckpointReader:
    """One model folder with safetensors weights, checked when it is opened.

    A multimodal folder is read as its text model (see :mod:`.wrapper`).

    Attributes:
        folder: the model's folder.
        wrapper: how the text model is wrapped; None for a text model's own folder.
        config: the parsed ``config.json``, or that of the text model.
        files: everything that is stored, by the names in the files, in the order of the shards'
            bytes.
        stored_entries: the same without what is not of the text model, by the model's names.

    Raises:
        CheckpointError: config or weights are missing, truncated, damaged, or point outside the
            folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        config = read_config(self.folder)
        self.files = read_entries(self.folder)
        self._whole_config = config
        self.wrapper = wrapper_of(self.folder, config, self.files)
        self.config = config if self.wrapper is None else dict(self.wrapper.text_json)
        self.stored_entries = self.files
        if self.wrapper is not None:
            self.stored_entries = {
                name: replace(self.files[key], name=name)
                for name, key in self.wrapper.stored.items()
            }
        self._sizes = {e.shard: e.shard.stat().st_size for e in self.files.values()}
        self._open: dict[Path, Any] = {}
        self._name_the_embeddings()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order they lie in the shards."""
        return tuple(self.entries)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(entry.nbytes for entry in self.files.values())

    @cached_property
    def coded(self) -> dict[str, CodedWeight]:
        """The weights that are stored as codes in a format that can be decoded, by name."""
        found = self.quantisation
        if found is None or not found.stored:
            return {}
        return coded_weights(self.stored_entries, found.method, found.settings, self.stored)

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """The tensors by name, as a plain checkpoint would hold them, in the order of the bytes.

        Decoded weights have the config's dtype, bfloat16 where it names none.
        """
        if not self.coded:
            return self.stored_entries
        by_codes = {next(iter(w.parts.values())): w for w in self.coded.values()}
        scales = {part for w in self.coded.values() for part in w.parts.values()} - by_codes.keys()
        plain: dict[str, TensorEntry] = {}
        for name, entry in self.stored_entries.items():
            if name in by_codes:
                weight = by_codes[name]
                plain[weight.name] = replace(
                    entry, name=weight.name, dtype=self._plain_dtype, shape=weight.shape
                )
            elif name not in scales:
                plain[name] = entry
        return plain

    @property
    def _plain_dtype(self) -> str:
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        return _DTYPES.get(str(named).removeprefix("torch."), "BF16")

    def stored_parts(self, name: str) -> tuple[str, ...]:
        """Return the stored tensors that hold a tensor: the same one, or codes and scales."""
        return tuple(self.coded[name].parts.values()) if name in self.coded else (name,)

    def entry(self, name: str) -> TensorEntry:
        """Return what is stored under a name.

        Raises:
            CheckpointError: there is no tensor of this name.
        """
        if name not in self.entries:
            raise CheckpointError(f"{self.folder} has no tensor '{name}'.")
        return self.entries[name]

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor; treat it as read-only.

        What is stored as it is comes as a view of the mapped file. Pages are read on first touch.
        Writing to the view changes private pages, not the file. A quantised weight is decoded anew
        on each call.

        Args:
            dtype: of a decoded weight; None: that of its entry.

        Raises:
            CheckpointError: there is no such tensor, its file changed since it was opened, or it
                is stored as codes of an unknown format.
        """
        import torch

        if name not in self.coded:
            self.refuse_quantised("its weights would be read without their scales")
            return self.stored(name)
        assert self.quantisation is not None
        decoded = self.coded[name].decoded(self.stored, self.quantisation.settings)
        kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        return decoded.to(dtype or kinds[self.entry(name).dtype])

    @cached_property
    def quantisation(self) -> Quantisation | None:
        """How the weights are quantised; None for plain weights."""
        return quantisation_of(self.folder, self.config, self._codes)

    @cached_property
    def _codes(self) -> list[TensorEntry]:
        """The stored tensors that hold codes; old GPT-2 files keep their causal mask as bytes."""
        found = [entry for entry in self.stored_entries.values() if is_code(entry)]
        buffers = self._row.buffers if found and self._row else ()
        return [entry for entry in found if not entry.name.endswith(buffers)]

    def refuse_quantised(self, what: str) -> None:
        """Refuse a checkpoint with codes that cannot be decoded.

        Args:
            what: what would go wrong: ``the streamed scan reads the weights``.

        Raises:
            CheckpointError: it has such codes, or its config says so and its weights are plain.
        """
        found = self.quantisation
        if found is None:
            return
        if found.stored:
            if self._unread is None:
                return
            raise CheckpointError(
                f"{self.folder} is quantised ({found.method}), and {what}: the format of "
                f"'{self._unread}' cannot be decoded; give the model without quantisation. "
                "(Recipes that only drop layers by their place, such as first_layers and "
                "last_layers, accept it.)"
            )
        if not found.ignored:
            raise CheckpointError(
                f"The config of {self.folder} says quant_method '{found.method}', and its weights "
                "are not quantised; remove quantization_config from config.json."
            )

    @cached_property
    def _unread(self) -> str | None:
        """A tensor with codes that cannot be decoded."""
        known = {part for weight in self.coded.values() for part in weight.parts.values()}
        return next((entry.name for entry in self._codes if entry.name not in known), None)

    def stored(self, name: str) -> torch.Tensor:
        """Return a stored tensor as it is: codes, scales or a plain weight.

        Raises:
            CheckpointError: there is no such tensor, or its file changed since it was opened.
        """
        return self.in_file(self.file_name(name))

    def file_name(self, name: str) -> str:
        """Return what the files call a stored tensor (:attr:`files`)."""
        if name not in self.stored_entries:
            raise CheckpointError(f"{self.folder} has no tensor '{name}'.")
        name = self.stored_entries[name].stored_as or name
        return name if self.wrapper is None else self.wrapper.stored[name]

    def in_file(self, name: str) -> torch.Tensor:
        """Return what the files hold under a name of theirs (:attr:`files`)."""
        entry = self.in_place(name)
        if entry.shard not in self._open:
            self._open[entry.shard] = open_shard(entry.shard, "pt")
        with library_errors(
            f"{entry.shard}: tensor '{name}' of dtype {entry.dtype} cannot be read",
            "upgrade torch, or download the file again",
            CheckpointError,
        ):
            tensor: torch.Tensor = self._open[entry.shard].get_tensor(name)
        return tensor

    def in_place(self, name: str) -> TensorEntry:
        """Return where the files hold what they call so (:attr:`files`).

        Raises:
            CheckpointError: the file changed since it was opened.
        """
        entry = self.files[name]
        size = entry.shard.stat().st_size
        if size != self._sizes[entry.shard]:  # a mapped file that shrank would end the process
            raise CheckpointError(
                f"{entry.shard} changed from {self._sizes[entry.shard]} to {size} bytes while it "
                "was read; start again with files that nobody changes."
            )
        return entry

    def release(self) -> None:
        """Close the mapped files; the pages of a tensor stay as long as the tensor."""
        self._open.clear()

    @cached_property
    def num_parameters(self) -> int:
        """Number of parameters; tied weights count once, buffers not at all."""
        return sum(self.parameter_counts.values())

    @property
    def num_outer(self) -> int:
        """Number of elements of what a multimodal folder holds besides its text model."""
        return sum(self.files[name].numel for name in self.wrapper.outer) if self.wrapper else 0

    @cached_property
    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the model by name of the tensor that holds them, packed ones unpacked."""
        found = self.quantisation
        return {
            name: self.entries[name].numel
            if found is None or name in self.coded
            else found.numel(self.entries[name])
            for name in self.parameter_names
        }

    @cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the tensors that are parameters of the model that transformers builds.

        Left out are buffers, a tied LM head stored twice, scales, and :attr:`extra_names`.
        """
        buffers = self._row.buffers if self._row else ()
        dropped = {*self.extra_names, *([self._head_name] if self.tied else [])}
        scaled = self.quantisation is not None and self.quantisation.stored
        return tuple(
            name
            for name in self.entries
            if name not in dropped
            and not name.endswith(buffers)
            and not (scaled and is_scale(name))
        )

    @cached_property
    def extra_names(self) -> tuple[str, ...]:
        """Names of tensors that the model of the config does not have.

        These are layers beyond the config's depth (multi-token prediction) and whatever lies
        outside of decoder and LM head (``mtp.…``, ``vision_tower.…``).
        """
        if self._row is None:
            return ()
        row, depth = self._row, self.depth
        # From the start of a name: towers have layers of their own.
        spelled = {row.layers, row.stored_path(row.layers), row.layers.removeprefix(f"{row.base}.")}
        layer = re.compile(rf"(?:{'|'.join(map(re.escape, spelled))})\.(\d+)\.")
        paths = (*row.embeddings, row.final_norm, row.layers, self._head_name, row.lm_head)
        paths += tuple(row.stored_as.values())
        bare = {path.removeprefix(f"{row.base}.") for path in paths if path}
        roots = {row.base, *(path.partition(".")[0] for path in bare)}

        def is_extra(name: str) -> bool:
            if name.partition(".")[0] not in roots:
                return True
            found = layer.match(name)
            return found is not None and depth is not None and int(found[1]) >= depth

        return tuple(name for name in self.entries if is_extra(name))

    @property
    def depth(self) -> int | None:
        """Number of decoder layers that the config names; None for an unknown family."""
        depth = config_entry(self.config, self._row.depth_key) if self._row else None
        return depth if isinstance(depth, int) else None

    @cached_property
    def tied(self) -> bool:
        """Whether the LM head is the embeddings, as transformers loads this checkpoint.

        The config (or the family's default, where it is silent) ties them, unless a head is stored
        that differs from the embeddings. Merged adapters and copies of tied models have both.
        """
        if self._head_name not in self.entries:
            return bool(self._row is None or config_entry(self.config, "tie_word_embeddings"))
        return bool(config_entry(self.config, "tie_word_embeddings")) and self._equals_embeddings()

    def _name_the_embeddings(self) -> None:
        """Call tied weights the embeddings where they are stored as the LM head only.

        So does what keeps the first name of shared tensors, such as ``safetensors.save_model``.
        """
        row, head = self._row, self._head_name
        if row is None or head not in self.stored_entries:
            return
        table = f"{row.embeddings[0]}.weight"
        if self.stored_entries.keys() & {*self._table_names}:
            return
        if config_entry(self.config, "tie_word_embeddings"):
            renamed = replace(self.stored_entries[head], name=table, stored_as=head)
            entries = (
                renamed if name == head else each for name, each in self.stored_entries.items()
            )
            self.stored_entries = {entry.name: entry for entry in entries}

    @cached_property
    def _row(self) -> Architecture | None:
        try:
            return architecture_of(self.config)
        except ArchitectureError:
            return None  # a family without a row can still be read

    @property
    def _head_name(self) -> str:
        path = self._row.lm_head if self._row else "lm_head"
        stored = f"{self._row.stored_path(path) if self._row else path}.weight"
        own = f"{path}.weight"
        known = self.stored_entries
        return own if own in known and stored not in known else stored

    @property
    def _table_names(self) -> list[str]:
        """Names that the embeddings may have in a file."""
        if self._row is None:
            return []
        path = self._row.embeddings[0]
        spelled = (path, path.removeprefix(f"{self._row.base}."), self._row.stored_path(path))
        return [f"{each}.weight" for each in spelled]

    @property
    def embeddings_name(self) -> str:
        """Name of the token embeddings in this checkpoint."""
        names = self._table_names
        return next((name for name in names if name in self.entries), names[0])

    def _equals_embeddings(self) -> bool:
        table = self.entries.get(self.embeddings_name) if self._row else None
        if table is None:
            return True
        head = self.entries[self._head_name]
        if head.shape != table.shape:
            return False
        read = self.tensor if self.coded else self.stored
        if head.dtype != table.dtype:
            both = (read(entry.name).float() for entry in (head, table))
            return bool(next(both).equal(next(both)))
        return bool(read(head.name).equal(read(table.name)))

    def fingerprint(self, progress: bool = True) -> str:
        """Return a SHA-256 (hex) of config and weights that does not depend on the sharding.

        It covers the config without notes that do not change what the model computes, and every
        tensor's name, dtype, shape and bytes.
        """
        digests = self._file_digests(progress)
        rows = [
            [name, entry.dtype, list(entry.shape), digests[name]]
            for name, entry in sorted(self.files.items())
        ]
        payload = json.dumps([config_digest(self._whole_config), rows])
        return hashlib.sha256(payload.encode()).hexdigest()

    def tensor_digests(self, progress: bool = True) -> dict[str, str]:
        """Return the SHA-256 (hex) of every tensor's bytes, by name.

        They are kept in the user's cache, keyed by path, size and time of change of the shard, so
        that a second call reads no weights.
        """
        digests = self._file_digests(progress)
        return {name: digests[self.file_name(name)] for name in self.stored_entries}

    def _file_digests(self, progress: bool) -> dict[str, str]:
        shards: dict[Path, list[TensorEntry]] = defaultdict(list)
        for entry in self.files.values():
            shards[entry.shard].append(entry)
        digests: dict[str, str] = {}
        total = sum(entry.nbytes for entry in self.files.values())
        with (
            byte_bar("Hashing weights", total, progress) as bar,
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        ):
            for path, entries in shards.items():
                digests.update(self._shard_digests(path, entries, pool, bar))
        return digests

    def check_finite(self, progress: bool = True) -> None:
        """Read all floating-point weights once, in small pieces.

        Raises:
            NumericsError: a tensor holds NaN or infinity; the message names it.
        """
        import torch

        floating = [e for e in self.files.values() if "F" in e.dtype]
        total = sum(entry.nbytes for entry in floating)
        with byte_bar("Checking weights", total, progress) as bar:
            for entry in floating:
                dtype = getattr(torch, DTYPES[entry.dtype][1])
                for piece in file_pieces(self.in_place(entry.name)):
                    values = torch.frombuffer(piece, dtype=dtype)
                    # One byte formats have no isfinite of their own.
                    widened = values.float() if values.itemsize == 1 else values
                    if not bool(torch.isfinite(widened).all()):
                        raise NumericsError(
                            f"Tensor '{entry.name}' in {entry.shard} holds NaN or infinity; use a "
                            "sound checkpoint."
                        )
                    bar.update(len(piece))

    def _shard_digests(
        self, path: Path, entries: list[TensorEntry], pool: ThreadPoolExecutor, bar: tqdm[Any]
    ) -> dict[str, str]:
        before = _identity(path)
        key = hashlib.sha256(json.dumps(before).encode()).hexdigest()
        record = user_cache() / "digests" / f"{key}.json"
        known = _read_record(record, before, entries)
        if known is not None:
            bar.update(sum(entry.nbytes for entry in entries))
            return known
        places = [self.in_place(entry.name) for entry in entries]
        hashes = pool.map(lambda place: _tensor_digest(place, bar), places)  # drops the GIL
        digests = {entry.name: value for entry, value in zip(entries, hashes, strict=True)}
        if _identity(path) == before:
            _write_record(record, before, digests)
        return digests


def byte_bar(what: str, total: int, progress: bool) -> tqdm[Any]:
    """Return a progress bar in bytes."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, delay=2, disable=not progress)


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a config as canonical JSON, without notes such as the writer's version."""
    kept = {key: value for key, value in config.items() if key not in _NOTES}
    if "torch_dtype" in kept:  # the older spelling
        kept.setdefault("dtype", kept.pop("torch_dtype"))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _identity(path: Path) -> list[str | int]:
    resolved = path.resolve()
    status = resolved.stat()
    return [str(resolved), status.st_size, status.st_mtime_ns]


def _tensor_digest(place: TensorEntry, bar: tqdm[Any]) -> str:
    digest = hashlib.sha256()
    for piece in file_pieces(place):
        digest.update(piece)
        bar.update(len(piece))
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
