"""One name per set of answers, so that cached ones never reach another model.

The harness keys its response cache (``--use_cache``) by the request alone. A pruned model that is
given the file of its dense parent would repeat the parent's answers. The cache is a table of key
and value that lets its owner encode keys; each model encodes them with its own name in front.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import CacheError


def weights_sha256(
    pretrained: str, model: Any, *, revision: str | None = None, patched: bool = False
) -> str:
    """Return a SHA-256 (hex) of the weights and the config that answer.

    Args:
        pretrained: what was loaded; the hash of its files is known or cheap.
        model: what answers; hashed itself where there are no safetensors files of it.
        revision: of a hub model.
        patched: adapters or deltas were added after loading.
    """
    of_files = None if patched else files_sha256(pretrained, revision=revision)
    if of_files is not None:
        return of_files
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    digest = hashlib.sha256(config.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def files_sha256(pretrained: str, *, revision: str | None = None) -> str | None:
    """Return the SHA-256 (hex) of a model's files, None if there are no safetensors files here."""
    folder = _folder(pretrained, revision)
    return None if folder is None else CheckpointReader(folder).fingerprint()


def _folder(pretrained: str, revision: str | None) -> Path | None:
    """The local folder of safetensors behind a path or a hub id, if there is one."""
    folder = Path(pretrained)
    if not folder.is_dir():
        try:
            config = try_to_load_from_cache(pretrained, "config.json", revision=revision)
        except HFValidationError:
            return None
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
    return folder if next(folder.glob("*.safetensors"), None) is not None else None


def model_identity(weights: str, settings: Mapping[str, Any]) -> str:
    """Name a model together with every setting that changes its answers (SHA-256 hex)."""
    payload = json.dumps({"weights": weights, **settings}, sort_keys=True, default=str)
    return hashlib.sha256(payload.encode()).hexdigest()


def separate_cache(cache: Any, identity: str) -> None:
    """Make a response cache (a ``SqliteDict``) read and write under this identity only.

    Raises:
        CacheError: the harness keeps its cache in another way than the one known here.
    """
    if cache is None:
        return
    if not hasattr(cache, "encode_key"):
        raise CacheError(
            f"This version of lm-eval caches responses in a {type(cache).__name__}, which cannot "
            "be kept apart by model; run without --use_cache."
        )
    prefix = f"{identity}:"
    cache.encode_key = lambda key: prefix + key
    cache.decode_key = lambda key: key.removeprefix(prefix)
