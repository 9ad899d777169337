"""The model that is compressed: found once, and each part of it read and hashed once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from streamline_bench.core.checkpoint.folder import resolve_pretrained
from streamline_bench.core.checkpoint.manifest import file_sha256
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import CheckpointError


@dataclass(frozen=True)
class SourceModel:
    """A model folder, handed along so that nobody looks at it twice.

    Attributes:
        folder: the local folder.
        trust_remote_code: let config and tokenizer run code from the folder.
        progress: show how far the hashing of the weights is.
    """

    folder: Path
    trust_remote_code: bool = False
    progress: bool = True
    _digests: dict[Path, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def find(
        cls,
        name: str | Path,
        revision: str | None = None,
        *,
        trust_remote_code: bool = False,
        progress: bool = True,
    ) -> SourceModel:
        """Return the model of a folder, a hub id or ``bundled``.

        Raises:
            CheckpointError: there is no such model.
        """
        return cls(resolve_pretrained(name, revision), trust_remote_code, progress)

    @cached_property
    def reader(self) -> CheckpointReader:
        """The tensors, lazily read."""
        return CheckpointReader(self.folder)

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 (hex) of config and weights, however they are sharded."""
        return self.reader.fingerprint(progress=self.progress)

    @cached_property
    def config(self) -> Any:
        """The transformers config."""
        from streamline_bench.modeling.loading import load_config

        return load_config(self.folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        from streamline_bench.modeling.loading import load_tokenizer

        return load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)

    def file_sha256(self, path: Path) -> str:
        """Return the SHA-256 (hex) of a file of the model or of its data; each is read once.

        Raises:
            CheckpointError: it cannot be read.
        """
        if path not in self._digests:
            try:
                self._digests[path] = file_sha256(path)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from None
        return self._digests[path]
