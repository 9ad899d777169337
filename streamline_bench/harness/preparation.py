"""From model arguments to the folder that is loaded: compressed now, earlier, or not at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamline_bench.compression.pipeline import CachedCheckpoint, compress_cached
from streamline_bench.compression.recipes import load_recipe, refuse_unread
from streamline_bench.core.checkpoint.folder import Manifest, read_manifest, resolve_pretrained
from streamline_bench.core.machine.environment import bundled_model, is_bundled
from streamline_bench.core.machine.ranks import joined, launched, own_device
from streamline_bench.errors import CheckpointError, RecipeError
from streamline_bench.harness.arguments import ModelArguments
from streamline_bench.modeling.loading import dtype_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedModel:
    """What to load.

    Attributes:
        pretrained: folder or hub id.
        manifest: of a compressed checkpoint; None for any other.
        key: content key in the cache; None unless a recipe was given.
        in_memory: the caller gave the model itself; ``pretrained`` is only its name.
    """

    pretrained: str
    manifest: Manifest | None = None
    key: str | None = None
    in_memory: bool = False

    def info(self) -> dict[str, Any]:
        """Return what belongs into ``results["config"]["streamline"]``."""
        if self.manifest is None:
            return {"path": self.pretrained, "recipe": None}
        manifest = self.manifest
        return {
            "path": self.pretrained,
            "content_key": self.key,
            "recipe": manifest.recipe,
            "method": manifest.method,
            "chosen": manifest.chosen,
            "source": manifest.source.model_dump(),
            "layers_before": manifest.layers_before,
            "layers_after": manifest.layers_after,
            "parameters_before": manifest.parameters_before,
            "parameters_after": manifest.parameters_after,
            "sparsity_requested": manifest.sparsity_requested,
            "sparsity_reached": manifest.sparsity_reached,
        }


def prepare(arguments: ModelArguments) -> PreparedModel:
    """Compress if a recipe asks for it, and say in the log what was done.

    Raises:
        StreamlineBenchError: the recipe, the model or the calibration data cannot be used.
    """
    pretrained = arguments.harness.get("pretrained")
    if pretrained is None or pretrained == "":
        raise CheckpointError("No model was given; add pretrained=<folder or hub id>.")
    if not isinstance(pretrained, str):
        if arguments.recipe is not None:
            raise RecipeError(
                "A recipe needs a folder or hub id as pretrained, and a loaded model was given."
            )
        name = str(getattr(pretrained, "name_or_path", type(pretrained).__name__))
        return PreparedModel(name, in_memory=True)
    if arguments.recipe is None:
        return _as_it_is(pretrained, arguments.harness)
    return _compressed(pretrained, arguments)


def _as_it_is(pretrained: str, harness: Mapping[str, Any]) -> PreparedModel:
    folder = bundled_model() if is_bundled(pretrained) else Path(pretrained).expanduser()
    looks_local = folder.is_absolute() or pretrained.startswith((".", "~"))
    other_format = any(harness.get(key) for key in ("gguf_file", "autogptq", "gptqmodel"))
    if not (folder.is_dir() or looks_local) or other_format:
        return PreparedModel(pretrained)
    resolve_pretrained(folder / str(harness.get("subfolder") or ""), _revision(harness))
    manifest = read_manifest(folder)
    if manifest is not None:
        logger.info(
            "%s is a compressed model (recipe '%s', %d of %d layers).",
            folder,
            manifest.recipe.get("name", "?"),
            manifest.layers_after,
            manifest.layers_before,
        )
    return PreparedModel(str(folder), manifest)


def _compressed(pretrained: str, arguments: ModelArguments) -> PreparedModel:
    harness = arguments.harness
    for key in ("gguf_file", "subfolder", "autogptq", "gptqmodel"):
        if harness.get(key):
            raise RecipeError(f"A recipe cannot be applied together with {key}={harness[key]}.")
    recipe = load_recipe(str(arguments.recipe), arguments.overrides)
    refuse_unread(recipe, arguments.overrides)
    device = _device(harness.get("device"))

    def make() -> CachedCheckpoint:
        return compress_cached(
            pretrained,
            recipe,
            revision=_revision(harness),
            cache=None if arguments.cache is None else Path(arguments.cache),
            device=own_device(device),
            dtype=_computing_dtype(harness),
            placement=arguments.placement,
            trust_remote_code=bool(harness.get("trust_remote_code")),
        )

    with joined(device) as ranks:  # the others find what the first one made in the cache
        result = ranks.in_turn(make)
    manifest = read_manifest(result.path)
    if manifest is None:
        raise CheckpointError(f"{result.path} has no streamline.json; delete it and try again.")
    logger.info(
        "%s recipe '%s': %s -> %d of %d layers, in %s",
        "Reusing the result of" if result.reused else "Compressed with",
        recipe.name,
        pretrained,
        manifest.layers_after,
        manifest.layers_before,
        result.path,
    )
    return PreparedModel(str(result.path), manifest, result.key)


def _revision(harness: Mapping[str, Any]) -> str | None:
    """None for main, which the harness gives where nobody asked for another."""
    revision = harness.get("revision")
    return None if revision in (None, "main") else str(revision)


def _device(named: Any) -> str:
    """The device HFLM will choose: it takes ``cuda`` for "whatever there is"."""
    device = str(named or "cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        return "cpu"
    # The harness gives each of several processes a GPU of its own, whatever was asked for.
    return device if launched().count == 1 else device.partition(":")[0]


def _computing_dtype(harness: Mapping[str, Any]) -> str:
    """The dtype that is asked for, as for ``compress --dtype``."""
    asked = harness.get("dtype") or harness.get("torch_dtype") or "auto"
    return "auto" if asked == "auto" else dtype_name(asked)
