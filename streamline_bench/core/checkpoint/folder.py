"""The folder of a model: found or downloaded, the tensors that its files hold, and its manifest.

Nothing in a downloaded folder is trusted: an index names plain files of the folder, links stay in
it, and pickles are never opened. The safetensors library checks the headers of the shards (sizes,
overlaps, lengths). What it cannot know is checked here: that the shards hold what the index
promises, each tensor once.

``streamline.json``, the manifest, says what a compressed checkpoint is. It is written last, so that
it vouches for the rest.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from pydantic import Field

from streamline_bench.core.files import atomic_write_text, read_json, validated
from streamline_bench.core.machine.environment import bundled_model, is_bundled
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.errors import CheckpointError, RecipeError, first_line, library_errors

log = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES = {
    "BOOL": (1, "bool"), "U8": (1, "uint8"), "I8": (1, "int8"),
    "F8_E5M2": (1, "float8_e5m2"), "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E8M0": (1, "float8_e8m0fnu"), "I16": (2, "int16"), "U16": (2, "uint16"),
    "F16": (2, "float16"), "BF16": (2, "bfloat16"), "I32": (4, "int32"), "U32": (4, "uint32"),
    "F32": (4, "float32"), "F64": (8, "float64"), "I64": (8, "int64"), "U64": (8, "uint64"),
}  # fmt: skip
"""The dtypes that are read, as safetensors spells and orders them: bytes per element, and torch's
name. Packed four- and six-bit ones are refused."""

_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
_MOST_LAYERS = 10_000
"""More is a damaged config: transformers would fill the memory with empty layers."""

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "tf_model.h5", "flax_model.msgpack")
_WANTED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "tokenizer*",
    "*.py",
    "*.tiktoken",
]
_CODE = ["config.json", "*.py"]
_UNWANTED = ["*/*", "consolidated*"]  # second copies of the weights in other layouts

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",  # of SentencePiece
    "chat_template*",
    "additional_chat_templates/*",
)

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""A folder with a tokenizer has at least one of these."""


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: its file ``shard``, dtype as safetensors spells it, and shape.

    Attributes:
        stored_as: its name in the file, where that is another than ``name``.
        offset: where its bytes begin in the file.
    """

    name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    stored_as: str = ""
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * DTYPES[self.dtype][0]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def resolve_pretrained(
    name: str | Path,
    revision: str | None = None,
    check: Callable[[Path], object] | None = None,
    *,
    weights: bool = True,
) -> Path:
    """Return the local folder of a model: as it is, ``bundled``, or a hub id downloaded if need be.

    Safetensors, JSON (processors included), templates, tokenizer and code files are fetched; no
    pickle is ever read, and code runs only where remote code is trusted.

    Args:
        check: is called with a folder that has the model's ``config.json``, before any weights are
            downloaded, and raises what speaks against this model.
        weights: whether they are needed; without them the config and its code are enough.

    Raises:
        CheckpointError: no such folder or hub model, or it has no config or no safetensors weights.
        RecipeError: a revision of a model that is not on the hub.
    """
    if not str(name).strip():
        raise CheckpointError("The model's name is empty; give a folder, a hub id or 'bundled'.")
    if revision is not None and is_local(name):
        raise RecipeError(
            f"Revision '{revision}' has no effect: '{name}' is a local folder; leave it out, or "
            "give a hub id."
        )
    if is_bundled(name):
        folder = bundled_model()
    else:
        local = _local_folder(name)
        if local is None and check is not None:
            check(_download(str(name), revision, ["config.json"]))
        folder = local or _download(str(name), revision, _WANTED if weights else _CODE)
    if not (folder / "config.json").is_file():
        find_shards(folder)  # a folder of another kind says more about itself than that
    read_config(folder)
    if check is not None:
        check(folder)
    if weights:
        find_shards(folder)
    return folder


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files that decide how text becomes tokens, sorted."""
    found = {path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def find_shards(folder: Path) -> dict[str, list[str] | None]:
    """Return file name -> tensors its index expects in it (None: no index, all count).

    Raises:
        CheckpointError: there are no safetensors weights, or the index is damaged or unsafe.
    """
    if (folder / SINGLE_NAME).is_file():
        return {SINGLE_NAME: None}
    if (folder / INDEX_NAME).is_file():
        return read_index(folder / INDEX_NAME)
    raise _no_weights(folder)


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; give a model folder.")
    config = _read_object(path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path} names no model_type; download it again.")
    for part in (config, config.get("text_config")):
        for key in _DEPTH_KEYS:
            depth = part.get(key) if isinstance(part, dict) else None
            if isinstance(depth, int) and depth > 0:
                checked_depth(depth, key, path)
    return config


def checked_depth(depth: object, key: str, where: object = "config.json") -> int:
    """Return a number of layers (CheckpointError: it is none, or too large to be one)."""
    if not isinstance(depth, int) or not 1 <= depth <= _MOST_LAYERS:
        raise CheckpointError(f"{where} has {key}={depth!r:.40}; give it the number of layers.")
    return depth


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path, CheckpointError, "download it again")
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again.")
    return value


def read_index(path: Path) -> dict[str, list[str] | None]:
    """Return file name -> tensors, of ``model.safetensors.index.json``.

    Raises:
        CheckpointError: it is damaged or unsafe.
    """
    mapping = _read_object(path).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{path} has no weight_map; download it again.")
    shards: dict[str, list[str] | None] = {}
    for tensor, shard in mapping.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise CheckpointError(
                f"{path} places tensor '{tensor}' in {shard!r:.120}, which is not a file of the "
                "model's folder; do not use this checkpoint."
            )
        expected = shards.setdefault(shard, [])
        assert expected is not None
        expected.append(tensor)
    return shards


def _is_plain(name: str) -> bool:
    """Whether a file name cannot leave its folder (no separators, dots only or drive), nor is too
    long for a file system.
    """
    short = len(name.encode("utf-8", "replace")) <= 255
    return short and bool(name.strip(".")) and not set(name) & set("/\\:\0")


def is_confined(folder: Path, path: Path) -> bool:
    """Whether a file is plain, or a link within the folder or to its place in the hub's cache.

    The hub's cache holds ``models--x--y/snapshots/<commit>/<file>`` as links to ``blobs`` next
    to ``snapshots``.
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
    if (path := next(folder.glob("*.gguf"), None)) is not None:
        return CheckpointError(
            f"{folder} has its weights as GGUF only ({path.name}), a format of llama.cpp; give the "
            "model's folder with safetensors, from which the GGUF file was made."
        )
    if next(folder.glob("consolidated*"), None) is not None:
        return CheckpointError(
            f"{folder} has its weights in the layout of the model's own authors only "
            f"(consolidated…), not in that of transformers; give the folder that has {SINGLE_NAME} "
            f"or {INDEX_NAME}, or convert it with the script of transformers "
            "(convert_…_weights_to_hf.py)."
        )
    return CheckpointError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}.")


def is_local(name: str | Path) -> bool:
    """Whether a model is ``bundled`` or a local folder, so that it has no revisions."""
    return is_bundled(name) or _local_folder(name) is not None


def _local_folder(name: str | Path) -> Path | None:
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError) as error:  # too long a name, ~ of a user who is not there
        raise CheckpointError(
            f"The model '{name}' cannot be looked up ({first_line(error)}); correct its name."
        ) from None


def check_name(name: str) -> None:
    """Refuse a name that only a folder can have, and no folder has (CheckpointError)."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_local and _local_folder(name) is None:
        raise CheckpointError(f"Model folder {name} does not exist.")


def _download(name: str, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    check_name(name)
    with library_errors(
        f"Model '{name}' is not a local folder, and the hub does not give it",
        "check the name, or give a local folder or 'bundled'",
        CheckpointError,
    ):
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED
            )
        )


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file, by name, in the order of their bytes.

    Raises:
        CheckpointError: the file is truncated, its header is damaged, or a dtype is not supported.
    """
    with open_shard(path, "np") as file:  # which loads no torch
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        entries = {
            name: TensorEntry(name, path, part.get_dtype(), tuple(part.get_shape()))
            for name, part in slices.items()
        }
    for entry in entries.values():
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor '{entry.name}' has dtype {entry.dtype}, which is not supported; "
                "convert it to one of " + ", ".join(DTYPES) + "."
            )
    # The library has made sure that the tensors lie end to end behind the header.
    with path.open("rb") as raw:
        place = 8 + int.from_bytes(raw.read(8), "little")
    for name, entry in entries.items():
        entries[name] = replace(entry, offset=place)
        place += entry.nbytes
    return entries


def open_shard(path: Path, framework: str) -> Any:
    """Return an open safetensors file.

    Raises:
        CheckpointError: it is truncated or its header is damaged.
    """
    from safetensors import safe_open

    size = path.stat().st_size if path.is_file() else 0
    with library_errors(
        f"{path} ({size} bytes) cannot be read",
        "it is truncated or damaged: download it again",
        CheckpointError,
    ):
        return safe_open(path, framework)


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a folder by name, in the order of their bytes.

    Raises:
        CheckpointError: a shard is missing, damaged or outside the folder, or it does not hold
            what the index promises, each tensor once.
    """
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
    if (folder / SINGLE_NAME).is_file() and (folder / INDEX_NAME).is_file():
        _leave_shards_out(folder, frozenset(entries))
    return entries


@functools.cache
def _leave_shards_out(folder: Path, read: frozenset[str]) -> None:
    """Of two sets of weights the single file is read, as transformers does; said once."""
    shards = read_index(folder / INDEX_NAME)
    differing = sorted(read ^ {name for names in shards.values() for name in names or ()})
    if differing:
        raise CheckpointError(
            f"{folder} holds {SINGLE_NAME} and {INDEX_NAME}, and only one of them has tensor "
            f"'{differing[0]}'; remove the one that is not of this model, with its files."
        )
    log.warning(
        "%s holds its weights twice: %s is read, and %s with its %d files is left out.",
        folder,
        SINGLE_NAME,
        INDEX_NAME,
        len(shards),
    )


def _check_shard(folder: Path, path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {INDEX_NAME} lists it; download it again.")
    if not is_confined(folder, path):
        raise CheckpointError(
            f"{path} is a link to {path.resolve()}, outside the model's folder; "
            "copy the file itself into the folder."
        )


MANIFEST_NAME = "streamline.json"
SCHEMA_VERSION = 1


class Source(Frozen):
    """The model that was compressed."""

    name: str
    revision: str | None = None
    weights_sha256: str


class Manifest(Frozen):
    """Where a checkpoint comes from and what was done to it.

    ``method`` says who wrote the method and in which version;
    ``chosen`` holds what the method decided (block, similarities); ``files`` the SHA-256 of every
    other file in the folder, by name; ``seconds`` wall time by stage. Sparsities are shares of all
    parameters, embeddings included, of the source model; of a multimodal folder, of its text model.
    ``whole_folder`` then has the sizes with the towers included.
    """

    schema_version: int = SCHEMA_VERSION
    source: Source
    recipe: dict[str, Any]
    method: dict[str, Any] = Field(default_factory=dict)
    chosen: dict[str, Any] = Field(default_factory=dict)
    parameters_before: int
    parameters_after: int
    layers_before: int
    layers_after: int
    sparsity_requested: float | None = None
    sparsity_reached: float
    whole_folder: dict[str, Any] | None = None
    calibration: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] | None = None
    seed: int = 0
    versions: dict[str, str] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``streamline.json``; call it after every other file of ``folder`` is there.

    Raises:
        OutputError: the file cannot be written.
    """
    payload = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True)
    atomic_write_text(Path(folder) / MANIFEST_NAME, payload + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder, or None if it has none (it is not one of ours).

    Raises:
        CheckpointError: there is one, and it is damaged or of a newer schema.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.exists():
        return None
    return validated(
        Manifest, read_json(path, CheckpointError, "compress again"), str(path),
        newest=SCHEMA_VERSION, error=CheckpointError, advice="compress again",
    )  # fmt: skip


def hash_files(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the SHA-256 (hex) of every file in ``folder`` but the manifest, by relative path.

    Args:
        known: hashes that were computed as the files were written.
    """
    folder, known = Path(folder), known or {}
    found = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    return {name: known.get(name) or file_sha256(path) for name, path in found.items()}


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Check every file the manifest names against its SHA-256.

    Raises:
        CheckpointError: one is missing or differs; the message names it.
    """
    for name, expected in manifest.files.items():
        path = Path(folder) / name
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing from a compressed checkpoint; compress again."
            )
        if file_sha256(path) != expected:
            raise CheckpointError(
                f"{path} was changed after compression (its SHA-256 differs from "
                f"{MANIFEST_NAME}); compress again."
            )


def update_digest(digest: hashlib._Hash, path: Path) -> None:
    """Feed a file to a digest, a few megabytes at a time."""
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    update_digest(digest, path)
    return digest.hexdigest()
