"""Documents that belong together: questions about one passage, questions of one subject.

Their answers are not independent, so that an interval over documents is too narrow. Which field of
a document says what belongs together is data: :data:`CLUSTER_FIELDS`. The tasks of a group (MMLU's
subjects) are clusters of the group without a field (:mod:`streamline_bench.stability.over_tasks`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from streamline_bench.stability.comparison import Clusters
from streamline_bench.stability.statistics import FloatArray, IntArray

CLUSTER_FIELDS = (
    ("local_boolq", "query", "passages", "\nQuestion:"),
    ("*boolq*", "passage", "passages", None),
    ("*race*", "article", "passages", None),
    ("*c3*", "passage", "passages", None),
    ("*c3*", "context", "passages", None),
    ("*multirc*", "paragraph", "passages", None),
    ("*record*", "passage", "passages", None),
    ("*squad*", "context", "passages", None),
    ("drop", "passage", "passages", None),
    ("*cmmlu*", "subject", "subjects", None),
    ("*mmlu*", "subject", "subjects", None),
    ("*ceval*", "subject", "subjects", None),
)
"""Task names (``*`` stands for anything), field of a document, what a cluster is, in the plural,
and the text at which the field's value is cut. The first entry counts whose pattern fits the task
and whose field the document has."""


def cluster_of(task: str, document: Any) -> str | None:
    """Short hash of what a document of ``task`` belongs to; None if it stands alone."""
    if not isinstance(document, Mapping):
        return None
    for pattern, field, kind, until in CLUSTER_FIELDS:
        found = document.get(field)
        if fnmatchcase(task, pattern) and isinstance(found, str | list):
            text = str(found)
            text = text if until is None else text.split(until)[0]
            return f"{kind}:{hashlib.sha256(text.encode('utf-8')).hexdigest()[:16]}"
    return None


@dataclass(frozen=True)
class ClusterLabels:
    """Clusters of documents.

    Attributes:
        labels: int64 [n], 0-based.
        shown: how many there are, of what kind.
    """

    labels: IntArray
    shown: Clusters

    def sums(self, *columns: npt.NDArray[Any]) -> FloatArray:
        """Sum each column [n] per cluster, float64 [clusters, columns]."""
        count = self.shown.count
        found = [np.bincount(self.labels, weights=column, minlength=count) for column in columns]
        return np.stack(found, axis=1)


def cluster_labels(names: pd.Series[Any]) -> ClusterLabels | None:
    """Label documents by the samples table's ``cluster`` column.

    A document without a name is a cluster of its own.

    Returns:
        None if no two documents share a cluster, or all are in one (which says nothing about how
        clusters differ).
    """
    if names.isna().all():
        return None
    codes, distinct = pd.factorize(names)
    alone = codes < 0
    labels = codes.astype(np.int64)
    labels[alone] = len(distinct) + np.arange(int(alone.sum()))
    sizes = np.bincount(labels)
    if len(sizes) < 2 or len(sizes) == len(labels):
        return None
    kind, separator, _ = str(distinct[0]).partition(":")
    kind = kind if separator else "clusters"
    return ClusterLabels(labels, Clusters(kind=kind, count=len(sizes), largest=int(sizes.max())))


def pooled_labels(parts: Sequence[tuple[int, ClusterLabels | None]]) -> ClusterLabels | None:
    """Clusters of several tasks together, given (documents, clusters) of each.

    The documents of a task without clusters stand alone; tasks share no cluster.

    Returns:
        None if no task has clusters.
    """
    known = [clusters.shown for _, clusters in parts if clusters is not None]
    if not known:
        return None
    found, count = [], 0
    for n, clusters in parts:
        found.append(count + (np.arange(n) if clusters is None else clusters.labels))
        count += n if clusters is None else clusters.shown.count
    kinds = sorted({shown.kind for shown in known}) + ["documents"] * (len(known) < len(parts))
    largest = max(shown.largest for shown in known)
    shown = Clusters(kind=" and ".join(kinds), count=count, largest=largest)
    return ClusterLabels(np.concatenate(found).astype(np.int64), shown)
