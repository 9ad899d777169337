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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from streamline_bench.stability.comparison import Clusters

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class ClusterField(NamedTuple):
    """Where a document says what it belongs to.

    Attributes:
        tasks: pattern of task names (``*`` stands for anything).
        field: of the document; only its text before ``until`` counts.
        kind: what a cluster is, in the plural.
    """

    tasks: str
    field: str
    kind: str
    until: str | None = None


CLUSTER_FIELDS = (
    ClusterField("local_boolq", "query", "passages", until="\nQuestion:"),
    ClusterField("*boolq*", "passage", "passages"),
    ClusterField("*race*", "article", "passages"),
    ClusterField("*c3*", "passage", "passages"),
    ClusterField("*c3*", "context", "passages"),
    ClusterField("*multirc*", "paragraph", "passages"),
    ClusterField("*record*", "passage", "passages"),
    ClusterField("*squad*", "context", "passages"),
    ClusterField("drop", "passage", "passages"),
    ClusterField("*cmmlu*", "subject", "subjects"),
    ClusterField("*mmlu*", "subject", "subjects"),
    ClusterField("*ceval*", "subject", "subjects"),
)
"""The first entry whose pattern fits the task and whose field the document has, counts."""


def _entry(task: str, document: Mapping[str, Any]) -> ClusterField | None:
    fitting = (entry for entry in CLUSTER_FIELDS if fnmatchcase(task, entry.tasks))
    return next((e for e in fitting if isinstance(document.get(e.field), str | list)), None)


def cluster_of(task: str, document: Any) -> str | None:
    """Short hash of what a document of ``task`` belongs to; None if it stands alone."""
    entry = _entry(task, document) if isinstance(document, Mapping) else None
    if entry is None:
        return None
    text = str(document[entry.field])
    if entry.until is not None:
        text = text.split(entry.until)[0]
    return f"{entry.kind}:{hashlib.sha256(text.encode('utf-8')).hexdigest()[:16]}"


def cluster_kind(name: str) -> str:
    """What the cluster of this name is, in the plural."""
    kind, separator, _ = name.partition(":")
    return kind if separator else "clusters"


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
        found = [
            np.bincount(self.labels, weights=column, minlength=self.shown.count)
            for column in columns
        ]
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
    shown = Clusters(
        kind=cluster_kind(str(distinct[0])), count=len(sizes), largest=int(sizes.max())
    )
    return ClusterLabels(labels, shown)


def pooled_labels(parts: Sequence[tuple[int, ClusterLabels | None]]) -> ClusterLabels | None:
    """Clusters of several tasks together, given (documents, clusters) of each.

    The documents of a task without clusters stand alone; tasks share no cluster.

    Returns:
        None if no task has clusters.
    """
    if all(clusters is None for _, clusters in parts):
        return None
    found, offset, largest = [], 0, 1
    kinds: set[str] = set()
    for n, clusters in parts:
        if clusters is None:
            labels, count = np.arange(n), n
        else:
            labels, count = clusters.labels, clusters.shown.count
            largest = max(largest, clusters.shown.largest)
            kinds.add(clusters.shown.kind)
        found.append(labels + offset)
        offset += count
    alone = any(clusters is None for _, clusters in parts)
    kind = " and ".join([*sorted(kinds), *(["documents"] if alone else [])])
    shown = Clusters(kind=kind, count=offset, largest=largest)
    return ClusterLabels(np.concatenate(found).astype(np.int64), shown)
