"""The sizes that methods reach, counted from the headers of a checkpoint.

What is stored counts as it is: a quantised weight by its codes and scales, a tensor in float32 by
four bytes. Layers beyond the decoder (multi-token prediction) are left out of every result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from streamline_bench.core.architecture import architecture_of, depth_of
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import layer_dtype, layer_names, layers_prefix
from streamline_bench.core.surgery import cached_values, model_sizes
from streamline_bench.methods.base import Compression, Size


@dataclass(frozen=True)
class Stored:
    """A checkpoint in numbers.

    Attributes:
        parameters, nbytes: of all that a result could hold.
        layer_parameters, layer_bytes: by layer.
        cached: numbers cached for a token, by layer; None: not known.
        item: bytes of a number in the layers' matrices.
    """

    parameters: int
    nbytes: int
    layer_parameters: tuple[int, ...]
    layer_bytes: tuple[int, ...]
    cached: tuple[int, ...] | None
    item: int

    @classmethod
    def of(cls, reader: CheckpointReader) -> Stored:
        """Count what a checkpoint holds; outside the text model of a multimodal one, too."""
        family = architecture_of(reader.config)
        sizes = model_sizes(reader)
        depth = len(sizes.layers)
        within = re.compile(re.escape(layers_prefix(reader, family)) + r"\.(\d+)\.")
        layers, total = [0] * depth, 0
        for name in layer_names(reader, family, range(depth)).values():
            size = stored_bytes(reader, name)
            total += size
            if found := within.match(name):
                layers[int(found[1])] += size
        outer = reader.wrapper.outer if reader.wrapper else ()
        return cls(
            sizes.total, total + sum(reader.files[name].nbytes for name in outer), sizes.layers,
            tuple(layers), cached_values(reader), layer_dtype(reader, family, 0).itemsize,
        )  # fmt: skip

    def less(
        self,
        given: dict[str, Any],
        *,
        parameters: int,
        nbytes: int | None = None,
        cached: int = 0,
        layers: int = 0,
    ) -> Size:
        """Return the size of the model without so much; a negative number is added.

        Args:
            nbytes: None: those of as many numbers in the layers' matrices.
        """
        return Size(
            given=given,
            parameters=self.parameters - parameters,
            nbytes=self.nbytes - (parameters * self.item if nbytes is None else nbytes),
            cached=None if self.cached is None else sum(self.cached) - cached,
            layers=len(self.layer_bytes) - layers,
        )


def stored_bytes(reader: CheckpointReader, name: str) -> int:
    """Return the bytes in which the files hold a tensor."""
    return sum(reader.stored_entries[part].nbytes for part in reader.stored_parts(name))


def whole_layers(
    work: Compression,
    options: Any,
    *,
    added: Callable[[int], int] = lambda removed: 0,
    most: int | None = None,
) -> Iterator[Size]:
    """Yield the model without 1, 2, … layers, those of the fewest bytes.

    Args:
        options: parameters of a method; ``options.most(depth)`` says how many layers they let go.
        added: number of layers removed -> parameters that stand in for them, at most.
        most: layers to remove at most; None: all but one.
    """
    stored, depth = Stored.of(work.reader), depth_of(work.config)
    limit = getattr(options, "most", lambda depth: depth)(depth)
    cached = sorted(stored.cached or ())
    for n in range(1, min(limit, depth - 1, depth if most is None else most) + 1):
        new = added(n)
        yield stored.less(
            {"n_layers": n},
            parameters=sum(sorted(stored.layer_parameters)[:n]) - new,
            nbytes=sum(sorted(stored.layer_bytes)[:n]) - new * stored.item,
            cached=sum(cached[:n]),
            layers=n,
        )


def short_share(share: float, same: Callable[[float], bool], *, digits: int = 4) -> float | None:
    """Return a number near ``share``, between 0 and 1, with few digits; None: there is none.

    Args:
        same: whether a number asks for the same size.
        digits: to begin with.
    """
    found = (round(share, places) for places in (*range(digits, 13), 17))
    return next((number for number in found if 0 < number < 1 and same(number)), None)
