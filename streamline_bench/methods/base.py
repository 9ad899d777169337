"""The contract between streamline-bench and a compression method, whoever wrote it.

A method is a class derived from :class:`Method`. It is given a :class:`Compression` (source model,
recipe, scratch folder) and hands back a :class:`Compressed` (config, copied tensors, new tensors,
facts). Writing, hashing, the manifest, the cache and any recovery are done for it.
:data:`API_VERSION` is raised when one of the three changes so that older methods would break.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from streamline_bench.core.architecture import sequence_limit
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.core.recipe.schema import CalibrationSpec, Frozen, Recipe
from streamline_bench.modeling.source_model import SourceModel

if TYPE_CHECKING:
    import torch

    from streamline_bench.core.data.calibration import CalibrationTokens

API_VERSION = 1
"""Version of the contract in this module."""


class NoParameters(Frozen):
    """The ``parameters`` of a method that has none."""


@dataclass(frozen=True)
class Compression:
    """What a method is given. Models, tokens and tensors are loaded when they are first used.

    Attributes:
        source: the model to compress; its folder is read only.
        recipe: the complete recipe; ``recipe.parameters`` has passed ``Method.parameters``.
        work: scratch folder, kept when the process is killed and given to the next attempt at the
            same result: files left there let it resume.
        device: torch device string for scanning and training.
        dtype: dtype of the loaded source model; ``None`` for float32.
        progress: show progress bars.
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
        """The source's tensors as they are stored, read one by one."""
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
        """The source model on ``device``, in evaluation mode."""
        from streamline_bench.modeling.loading import load_model

        return load_model(
            self.folder,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.source.trust_remote_code,
        )

    def release_model(self) -> None:
        """Free the source model; a later use loads it again."""
        self.__dict__.pop("model", None)

    def tokens(self, spec: CalibrationSpec) -> CalibrationTokens:
        """Return calibration or training tokens: int64 ``[sequences, length]`` with a mask.

        Raises:
            CalibrationError: the source cannot be read or holds too little.
        """
        from streamline_bench.core.data.calibration import load_calibration

        return load_calibration(
            spec,
            self.tokenizer,
            model_folder=self.folder,
            max_length=sequence_limit(self.config),
            vocabulary=self.config.vocab_size,
            progress=self.progress,
        )


@dataclass(frozen=True)
class Compressed:
    """What a method hands back: enough to write the checkpoint and its manifest.

    Attributes:
        config: the new ``config.json`` as a mapping.
        names: new tensor name -> name in the source. These bytes are copied and never loaded.
        tensors: new or changed tensors, in the dtype to store. A mapping that makes each tensor
            when it is asked for keeps memory small.
        layers_after: decoder layers of the result.
        chosen: what the method decided (block, scores, sizes reached); JSON.
        calibration: facts about the calibration tokens, ``CalibrationTokens.summary()``.
        training: facts about the training, if there was any; JSON.
        artefacts: file name -> text, written beside the weights (similarity, training curve).
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
    """A compression method: one class in one file, one recipe, one test.

    Attributes:
        name: what errors call it; the name that it is registered under.
        api: the :data:`API_VERSION` that the class is written for. A method of another package has
            to state it.
        version: part of the cache key; raise it when the same recipe gives other tensors than
            before.
        parameters: schema of ``recipe.parameters``.
        reads: which of ``replacement``, ``training`` and ``reference_quirks`` the method reads. A
            recipe that sets another one is refused.
        calibrated: whether the method reads calibration text.
    """

    name: ClassVar[str]
    api: ClassVar[int] = API_VERSION
    version: ClassVar[int] = 1
    parameters: ClassVar[type[BaseModel]] = NoParameters
    reads: ClassVar[frozenset[str]] = frozenset()
    calibrated: ClassVar[bool] = True

    def reads_calibration(self, parameters: Mapping[str, Any]) -> bool:
        """Whether it looks at calibration text with these values of its own parameters."""
        return self.calibrated

    @abstractmethod
    def compress(self, work: Compression) -> Compressed:
        """Compress the source model as the recipe says.

        Raises:
            StreamlineBenchError: one of its kinds. Each is one sentence: what was wrong, with the
                value, and what to do.
        """

    def stock(self, recipe: Recipe) -> bool:
        """Whether plain transformers loads the result, of families that have a class for it.

        Otherwise the result is of model type ``streamline``.
        """
        return True


def write_compressed(
    folder: Path, reader: CheckpointReader, result: Compressed, *, progress: bool = True
) -> None:
    """Write weights, config, tokenizer and artefacts into an existing, empty folder.

    Args:
        reader: the checkpoint that ``result.names`` speaks of.

    Raises:
        CheckpointError: a named tensor is not in it.
        OutputError: the folder cannot be written.
    """
    from streamline_bench.core.checkpoint.writer import compose

    compose(
        reader, folder, config=dict(result.config), names=result.names, extra=result.tensors,
        progress=progress,
    )  # fmt: skip
    for name, text in result.artefacts.items():
        atomic_write_text(folder / name, text)
