"""What a plan keeps of models that are loaded as they are: hashes and sizes, from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import RecipeError, StreamlineBenchError
from streamline_bench.harness.trunk.stack import tokenizer_sha256
from streamline_bench.modeling.loading import SourceModel, dtype_name
from streamline_bench.runs.planning.plan import ModelPlan
from streamline_bench.runs.planning.request import RowRequest

_NAMED = ("pretrained", "revision", "dtype", "trust_remote_code", "tokenizer")
"""Arguments of the harness's model that have keys of their own in a row."""


def model_plan(source: SourceModel) -> ModelPlan:
    """Return what is kept of a dense model (CheckpointError: it is damaged)."""
    local = Path(source.name).expanduser().is_dir()
    return ModelPlan(
        name=str(source.folder.resolve()) if local else source.name,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        weights_sha256=source.weights_sha256,
        tokenizer_sha256=tokenizer_sha256(source.folder),
        **_sizes(source.reader),
    )


def checkpoint_plan(label: str, request: RowRequest, *, progress: bool) -> ModelPlan:
    """Return what is kept of a checkpoint that was made elsewhere.

    StreamlineBenchError: naming the row, if the checkpoint cannot be used.
    """
    try:
        return _checkpoint_plan(request, progress)
    except StreamlineBenchError as error:
        raise type(error)(f"Row '{label}': {error}") from None


def _checkpoint_plan(request: RowRequest, progress: bool) -> ModelPlan:
    named = [key for key in request.model_args if key in _NAMED]
    if named:
        raise RecipeError(f"model_args has '{named[0]}'; give '{named[0]}' itself.")
    if request.dtype is not None:
        dtype_name(request.dtype)
    source = SourceModel.find(
        str(request.checkpoint),
        request.revision,
        trust_remote_code=request.trust_remote_code,
        progress=progress,
    )
    own: dict[str, Any] = {"dtype": request.dtype, "model_args": request.model_args}
    if request.tokenizer is not None:
        folder = Path(request.tokenizer).expanduser()
        here = folder.is_dir()
        own["tokenizer"] = str(folder.resolve()) if here else request.tokenizer
        own["tokenizer_sha256"] = tokenizer_sha256(folder) if here else f"hub: {request.tokenizer}"
    return model_plan(source).model_copy(update=own)


def _sizes(reader: CheckpointReader) -> dict[str, int | None]:
    return {
        "parameters": reader.num_parameters,
        "nbytes": reader.stored_bytes,
        "layers": reader.depth,
    }
