"""The folder of a model: found or downloaded, and which files in it may be read.

Nothing in a downloaded folder is trusted: an index names plain files of the folder, links stay in
it, and pickles are never opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from streamline_bench.errors import CheckpointError, first_line, library_errors
from streamline_bench.resources import bundled_model, is_bundled

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "tf_model.h5", "flax_model.msgpack")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "tokenizer*"]
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
    read_config(folder)
    return folder


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files that decide how text becomes tokens, sorted."""
    found = {path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def find_shards(folder: Path) -> dict[str, list[str] | None]:
    """Return file name -> tensors its index expects in it (None: whatever it holds).

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


def read_index(path: Path) -> dict[str, list[str] | None]:
    """Return file name -> tensors, of ``model.safetensors.index.json``.

    Raises:
        CheckpointError: it is damaged or unsafe.
    """
    mapping = _read_json(path).get("weight_map")
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
    return CheckpointError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}.")


def _local_folder(name: str | Path) -> Path | None:
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError) as error:  # too long a name, ~ of a user who is not there
        raise CheckpointError(
            f"The model '{name}' cannot be looked up ({first_line(error)}); correct its name."
        ) from None


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_local:
        raise CheckpointError(f"Model folder {name} does not exist.")
    with library_errors(
        f"Model '{name}' is not a local folder, and the hub does not give it",
        "check the name, or give a local folder or 'bundled'",
        CheckpointError,
    ):
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
            )
        )
