"""Opens a model folder: finds it, checks it, and reads single tensors without loading the rest.

What is written lies in :mod:`.staging` (atomic folders) and :mod:`.manifest`
(``streamline.json``); both are reachable from here because whoever reads checkpoints needs them.
"""

from __future__ import annotations

import json
import mmap
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.checkpoint.fingerprint import fingerprint
from streamline_bench.core.checkpoint.manifest import Manifest, read_manifest, write_manifest
from streamline_bench.core.checkpoint.tensor_file import TensorEntry, read_header
from streamline_bench.core.files.cache import user_cache
from streamline_bench.core.files.staging import atomic_write_bytes, atomic_write_text, staged_output
from streamline_bench.core.recipe.validation import first_line
from streamline_bench.errors import ArchitectureError, CheckpointError
from streamline_bench.resources import bundled_model, is_bundled

if TYPE_CHECKING:
    import torch

__all__ = [
    "CheckpointReader",
    "Manifest",
    "TensorEntry",
    "atomic_write_bytes",
    "atomic_write_text",
    "read_manifest",
    "resolve_pretrained",
    "staged_output",
    "user_cache",
    "write_manifest",
]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "tf_model.h5", "flax_model.msgpack")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "tokenizer*"]
_UNWANTED = ["*/*", "consolidated*"]  # second copies of the weights in other layouts


def resolve_pretrained(name: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of a model: as it is, ``bundled``, or a hub id downloaded if need be.

    Only safetensors, JSON and tokenizer files are fetched; no pickle is ever read.

    Raises:
        CheckpointError: no such folder or hub model, or it has no config or no safetensors weights.
    """
    if is_bundled(name):
        folder = bundled_model()
    elif (local := _local_folder(name)) is not None:
        folder = local
    else:
        folder = _download(str(name), revision)
    find_shards(folder)
    _read_config(folder)
    return folder


class CheckpointReader:
    """One model folder with safetensors weights, checked when it is opened.

    Attributes:
        folder: the model's folder.
        config: the parsed ``config.json``.
        entries: where each tensor's bytes lie, by name.

    Raises:
        CheckpointError: config or weights are missing, truncated, damaged, or point outside the
            folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.config = _read_config(self.folder)
        self.entries = _read_entries(self.folder)
        self._maps: dict[Path, mmap.mmap] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order they lie in the shards."""
        return tuple(self.entries)

    def entry(self, name: str) -> TensorEntry:
        """Return where a tensor's bytes lie.

        Raises:
            CheckpointError: there is no tensor of this name.
        """
        try:
            return self.entries[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor '{name}'.") from None

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as a view of the mapped file, in its stored dtype; treat it as read-only.

        Pages are read on first touch. Writing to the view changes private pages, not the file.
        """
        from streamline_bench.core.checkpoint.tensor_view import view

        entry = self.entry(name)
        if entry.shard not in self._maps:
            with entry.shard.open("rb") as file:
                # A private mapping is writable, so that torch takes it without copying or warning.
                self._maps[entry.shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return view(entry, self._maps[entry.shard])

    @cached_property
    def num_parameters(self) -> int:
        """Number of parameters; tied weights count once, buffers not at all."""
        return sum(self.entries[name].numel for name in self.parameter_names)

    @cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the tensors that are parameters; a tied LM head stored twice is left out."""
        buffers: tuple[str, ...] = ()
        head = "lm_head"
        try:
            row = architecture_of(self.config)
        except ArchitectureError:
            pass  # a family without a row can still be read
        else:
            buffers, head = row.buffers, row.stored_as.get(row.lm_head, row.lm_head)
        tied = self.config.get("tie_word_embeddings")
        if tied is None:
            tied = f"{head}.weight" not in self.entries
        dropped = {f"{head}.weight"} if tied else set()
        return tuple(n for n in self.entries if n not in dropped and not n.endswith(buffers))

    def fingerprint(self, progress: bool = True) -> str:
        """Return a SHA-256 (hex) of config and weights that does not depend on the sharding.

        Digests of tensors are kept in the user's cache, keyed by path, size and time of change of
        their shard, so that a second call reads no weights.
        """
        return fingerprint(self, progress=progress)

    def check_finite(self, progress: bool = True) -> None:
        """Read all floating-point weights once, in small pieces.

        Raises:
            NumericsError: a tensor holds NaN or infinity; the message names it.
        """
        from streamline_bench.core.checkpoint.tensor_view import check_finite

        check_finite(self.entries.values(), progress=progress)


def find_shards(folder: Path) -> dict[str, list[str] | None]:
    """Return file name -> tensors its index expects in it (None: whatever it holds).

    Raises:
        CheckpointError: there are no safetensors weights, or the index is damaged or unsafe.
    """
    if (folder / SINGLE_NAME).is_file():
        return {SINGLE_NAME: None}
    if (folder / INDEX_NAME).is_file():
        return _read_index(folder / INDEX_NAME)
    raise _no_weights(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json, so it is no model folder.")
    config = _read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path} names no model_type; download it again.")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again.")
    return value


def _read_index(path: Path) -> dict[str, list[str] | None]:
    mapping = _read_json(path).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{path} has no weight_map; download it again.")
    shards: dict[str, list[str] | None] = {}
    for tensor, shard in mapping.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise CheckpointError(
                f"{path} places tensor '{tensor}' in {shard!r}, outside the model's folder; "
                "do not use this checkpoint."
            )
        expected = shards.setdefault(shard, [])
        assert expected is not None
        expected.append(tensor)
    return shards


def _is_plain(name: str) -> bool:
    """Whether a file name cannot leave its folder: no separators, no dots only, no drive."""
    return bool(name.strip(".")) and not set(name) & set("/\\:\0")


def _read_entries(folder: Path) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for shard, expected in find_shards(folder).items():
        path = folder / shard
        _check_shard(folder, path)
        found = read_header(path)
        missing = sorted(set(expected or ()) - found.keys())
        if missing:
            raise CheckpointError(
                f"{path} lacks tensor '{missing[0]}', which {INDEX_NAME} places there; "
                "download it again."
            )
        double = sorted(found.keys() & entries.keys())
        if double:
            raise CheckpointError(
                f"{path} holds tensor '{double[0]}', which another shard holds too; "
                "download it again."
            )
        entries.update(found)
    return entries


def _check_shard(folder: Path, path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {INDEX_NAME} lists it; download it again.")
    if not is_confined(folder, path):
        raise CheckpointError(
            f"{path} is a link to {path.resolve()}, outside the model's folder; "
            "copy the file itself into the folder."
        )


def is_confined(folder: Path, path: Path) -> bool:
    """Whether a file is no link, or one that stays in the folder or its place in the hub's cache.

    The hub's cache holds ``models--x--y/snapshots/<commit>/<file>`` as links to ``blobs`` beside
    ``snapshots``.
    """
    if not path.is_symlink():
        return True
    target, home = path.resolve(), folder.resolve()
    in_cache = home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--")
    return target.is_relative_to(home) or (
        in_cache and target.is_relative_to(home.parent.parent / "blobs")
    )


def _no_weights(folder: Path) -> CheckpointError:
    if any(True for pattern in _PICKLES for _ in folder.glob(pattern)):
        return CheckpointError(
            f"{folder} has its weights as pickles only, which can run code when read; if you trust "
            'them, convert them with: python -c "from transformers import AutoModelForCausalLM '
            f"as M; M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}')\""
        )
    if (folder / "adapter_model.safetensors").is_file():
        return CheckpointError(
            f"{folder} is a PEFT adapter, not a model; merge it into its base model first "
            "(peft: merge_and_unload)."
        )
    return CheckpointError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}.")


def _local_folder(name: str | Path) -> Path | None:
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError) as error:  # too long a name, ~ of a user who is not there
        raise CheckpointError(
            f"The model '{name}' cannot be looked for ({first_line(error)}); mend its name."
        ) from None


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_local:
        raise CheckpointError(f"Model folder {name} does not exist.")
    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"Model '{name}' is neither a folder nor to be had from the hub "
            f"({first_line(error)}); check the name, or give a local folder, or 'bundled'."
        ) from error
    return Path(found)
