"""How alike the hidden states at every two layer boundaries are, and which block that picks.

Boundary ``0`` is the input of the first layer, boundary ``l`` the output of layer ``l - 1``,
boundary ``L`` that of the last. Removing layers ``start .. start + n - 1`` claims that boundary
``start + n`` looks like boundary ``start``: entry ``[start, start + n]`` measures that.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from streamline_bench.core.files import atomic_write_text
from streamline_bench.errors import CalibrationError, SparsityError

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)

Matrix: TypeAlias = npt.NDArray[np.float64]
Metric: TypeAlias = Literal["cosine", "angular"]
LastState: TypeAlias = Literal["raw", "postnorm"]
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Block:
    """Layers ``start .. start + n - 1`` and how alike the states before and after them are.

    Attributes:
        score: mean cosine (higher is more alike) or mean angular distance (lower is).
        contains_first_layer: layer 0 is in the block; it maps embeddings to the residual stream
            and removing it often ruins a model even at a good score.
    """

    start: int
    n: int
    score: float
    metric: Metric = "cosine"

    @property
    def stop(self) -> int:
        """The first layer after the block."""
        return self.start + self.n

    @property
    def contains_first_layer(self) -> bool:
        return self.start == 0


@dataclass(frozen=True, eq=False)
class Similarity:
    """Statistics of every pair of the ``L + 1`` boundaries.

    Attributes:
        cosine: float64 ``[L + 1, L + 1]``, mean over all tokens of ``cos(h_i, h_j)``
            (LLM-Streamline, arXiv 2403.19135, section 3.1).
        angular: float64 ``[L + 1, L + 1]``, mean over the samples of ``arccos(cos(h_i, h_j)) / pi``
            at the last token of each (arXiv 2403.17887, equation 6).
        num_tokens, num_samples: what the means are taken over; pads are not counted.
        last_state: whether boundary ``L`` is the last layer's raw output or that of the final
            norm (``postnorm``, as in reference implementations).
        details: where it comes from (model, calibration), for the record.
    """

    cosine: Matrix
    angular: Matrix
    num_tokens: int
    num_samples: int
    last_state: LastState = "raw"
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return len(self.cosine) - 1

    @property
    def block_influence(self) -> Matrix:
        """``1 - cosine`` across each layer, float64 ``[L]`` (ShortGPT, arXiv 2403.03853)."""
        influence: Matrix = 1.0 - np.diagonal(self.cosine, offset=1)
        return influence

    def scores(self, n: int, metric: Metric = "cosine") -> Matrix:
        """Return the score of each block of ``n`` layers, float64 ``[L - n + 1]``, by start.

        Raises:
            SparsityError: ``n`` is not between 1 and ``L``.
        """
        if not 1 <= n <= self.num_layers:
            raise SparsityError(
                f"A block of {n} layers cannot be removed from {self.num_layers}; give a number "
                f"from 1 to {self.num_layers}."
            )
        scores: Matrix = np.diagonal(self._matrix(metric), offset=n).copy()
        return scores

    def best_block(
        self,
        n: int,
        metric: Metric = "cosine",
        *,
        allow_first_layer: bool = True,
        allow_last_layer: bool = True,
    ) -> Block:
        """Return the block of ``n`` layers whose ends are most alike; the first one if several.

        Args:
            metric: ``cosine`` takes the highest mean cosine, ``angular`` the lowest distance.
            allow_first_layer: consider the block that starts at layer 0.
            allow_last_layer: consider the block that ends with the last layer.

        Raises:
            SparsityError: no block of that size is left.
        """
        scores = self.scores(n, metric)
        first = 0 if allow_first_layer else 1
        last = len(scores) if allow_last_layer else len(scores) - 1
        if first >= last:
            raise SparsityError(
                f"No block of {n} of {self.num_layers} layers leaves the protected ends in place; "
                "remove fewer layers."
            )
        allowed = scores[first:last]
        start = first + int(allowed.argmax() if metric == "cosine" else allowed.argmin())
        block = Block(start, n, float(scores[start]), metric)
        if block.contains_first_layer:
            _log.warning(
                "The chosen block of %d layers contains layer 0, which often ruins a model; "
                "allow_first_layer=False looks beyond it.",
                n,
            )
        return block

    def table(self, n: int | None = None) -> pd.DataFrame:
        """Return one row per block (of ``n`` layers, or of 1 to ``L - 1``), ranked within its size.

        Columns: ``n, start, stop, cosine, angular, rank_cosine, rank_angular,
        contains_first_layer``; rank 1 is the block that would be removed first.
        """
        import pandas as pd

        frames = []
        for size in range(1, max(self.num_layers, 2)) if n is None else [n]:
            cosine, angular = self.scores(size, "cosine"), self.scores(size, "angular")
            start = np.arange(len(cosine))
            columns = {
                "n": size,
                "start": start,
                "stop": start + size,
                "cosine": cosine,
                "angular": angular,
                "rank_cosine": _ranks(-cosine),
                "rank_angular": _ranks(angular),
                "contains_first_layer": start == 0,
            }
            frames.append(pd.DataFrame(columns))
        table: pd.DataFrame = pd.concat(frames, ignore_index=True)
        return table

    def save(self, path: Path | str) -> None:
        """Write JSON; :meth:`load` gives exactly the same numbers back.

        Raises:
            OutputError: the file cannot be written.
        """
        payload = {
            "schema_version": _SCHEMA_VERSION,
            "num_layers": self.num_layers,
            "num_tokens": self.num_tokens,
            "num_samples": self.num_samples,
            "last_state": self.last_state,
            "details": dict(self.details),
            "cosine": self.cosine.tolist(),
            "angular": self.angular.tolist(),
        }
        atomic_write_text(Path(path), json.dumps(payload, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Similarity:
        """Read what :meth:`save` wrote.

        Raises:
            CalibrationError: the file is missing or is not such a file.
        """
        try:
            payload = json.loads(Path(path).read_text(encoding="utf-8"))
            if payload["schema_version"] != _SCHEMA_VERSION:
                raise ValueError(f"schema version {payload['schema_version']}")
            loaded = cls(
                np.array(payload["cosine"], dtype=np.float64),
                np.array(payload["angular"], dtype=np.float64),
                payload["num_tokens"],
                payload["num_samples"],
                payload["last_state"],
                payload["details"],
            )
            if not loaded.cosine.shape == loaded.angular.shape == (payload["num_layers"] + 1,) * 2:
                raise ValueError(f"a matrix of shape {loaded.cosine.shape}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"{path} is not a similarity file of this version ({error}); run the scan again."
            ) from None
        return loaded

    def _matrix(self, metric: Metric) -> Matrix:
        if metric not in ("cosine", "angular"):
            raise CalibrationError(f"Unknown metric '{metric}'; give 'cosine' or 'angular'.")
        return self.cosine if metric == "cosine" else self.angular


def _ranks(costs: Matrix) -> npt.NDArray[np.int64]:
    ranks = np.empty(len(costs), dtype=np.int64)
    ranks[np.argsort(costs, kind="stable")] = np.arange(1, len(costs) + 1)
    return ranks
