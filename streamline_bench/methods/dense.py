"""The dense model as a row of its own: nothing is removed."""

from __future__ import annotations

import json

from streamline_bench.core.architecture import depth_of
from streamline_bench.methods.base import Compressed, Compression, Method


class Dense(Method):
    """Copy the checkpoint as it is, so that the dense row is made as the others are."""

    name = "dense"
    streamed = True
    calibrated = False
    seeded = False

    def compress(self, work: Compression) -> Compressed:
        config = json.loads((work.folder / "config.json").read_text(encoding="utf-8"))
        return Compressed(
            config=config,
            names={name: name for name in work.reader.names},
            layers_after=depth_of(work.config),
        )
