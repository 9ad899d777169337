"""What a compression method is given, and what it hands back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.core.recipe.schema import CalibrationSpec, Frozen, Recipe
from streamline_bench.modeling.source_model import SourceModel

if TYPE_CHECKING:
    import torch

    from streamline_bench.core.data.calibration import CalibrationTokens

__all__ = ["Compressed", "Compression", "Method", "NoParameters", "write_compressed"]


class NoParameters(Frozen):
    """The ``parameters`` of a method that has none."""


@dataclass(frozen=True)
class Compression:
    """One compression at work: the source model, the recipe, and a folder that survives a kill.

    Attributes:
        source: the model to compress.
        recipe: what to do.
        work: scratch folder kept between attempts, so that training resumes.
        device: torch device string for scanning and training.
        dtype: dtype of the loaded source model, ``None`` for float32.
    """

    source: SourceModel
    recipe: Recipe
    work: Path
    device: str = "cpu"
    dtype: str | None = None
    progress: bool = True

    @property
    def folder(self) -> Path:
        """Local folder of the source checkpoint."""
        return self.source.folder

    @property
    def reader(self) -> CheckpointReader:
        """The source's tensors, lazily read."""
        return self.source.reader

    @property
    def config(self) -> Any:
        """The source's transformers config."""
        return self.source.config

    @property
    def tokenizer(self) -> Any:
        """The source's tokenizer."""
        return self.source.tokenizer

    @cached_property
    def model(self) -> Any:
        """The source model, loaded on first use, in evaluation mode."""
        from streamline_bench.modeling.loading import load_model

        return load_model(
            self.folder,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.source.trust_remote_code,
        )

    def release_model(self) -> None:
        """Let go of the source model; a later use would load it again."""
        self.__dict__.pop("model", None)

    def tokens(self, spec: CalibrationSpec) -> CalibrationTokens:
        """Load calibration or training tokens for this model."""
        from streamline_bench.core.data.calibration import load_calibration

        return load_calibration(
            spec,
            self.tokenizer,
            model_folder=self.folder,
            max_length=getattr(self.config, "max_position_embeddings", None),
            progress=self.progress,
        )


@dataclass(frozen=True)
class Compressed:
    """What a method hands back: enough to write the checkpoint, and what its manifest tells.

    Attributes:
        config: the new ``config.json`` as a mapping.
        names: new tensor name -> name in the source; these bytes are copied, never loaded.
        tensors: new or changed tensors.
        layers_after: decoder layers of the result.
        chosen: what the method decided (block, similarity, sizes reached).
        calibration: facts about the tokens looked at.
        training: facts about the training, if there was any.
        artefacts: file name -> text, laid beside the weights (similarity, training curve).
    """

    config: Mapping[str, Any]
    names: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    layers_after: int = 0
    chosen: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None
    artefacts: Mapping[str, str] = field(default_factory=dict)


class Method(ABC):
    """A compression method: one file, one line in the registry, one recipe, one test.

    Attributes:
        parameters: schema of ``recipe.parameters``.
        reads: which of ``replacement``, ``training`` and ``reference_quirks`` it reads; a recipe
            that gives another one is refused.
        calibrated: it looks at calibration text.
    """

    name: ClassVar[str]
    parameters: ClassVar[type[BaseModel]] = NoParameters
    reads: ClassVar[frozenset[str]] = frozenset()
    calibrated: ClassVar[bool] = True

    def reads_calibration(self, parameters: Mapping[str, Any]) -> bool:
        """Whether it looks at calibration text with these values of its own parameters."""
        return self.calibrated

    @abstractmethod
    def compress(self, work: Compression) -> Compressed:
        """Compress the source model as the recipe says."""


def write_compressed(folder: Path, reader: CheckpointReader, result: Compressed) -> None:
    """Write weights, config, tokenizer and artefacts into an existing, empty folder.

    Args:
        reader: the checkpoint that ``result.names`` speaks of.

    Raises:
        CheckpointError: a named tensor is not in it.
        OutputError: the folder cannot be written.
    """
    from streamline_bench.core.checkpoint.writer import compose

    compose(reader, folder, config=dict(result.config), names=result.names, extra=result.tensors)
    for name, text in result.artefacts.items():
        atomic_write_text(folder / name, text)
