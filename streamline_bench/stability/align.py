"""Pairs the answers of two runs, and refuses when the runs were not asked the same thing.

Rows are paired by (task, filter, doc_id). Before that, in this order, the runs must agree on: the
engine, the tasks, their versions and number of shots, chat template and system instruction, the
filters, the documents, and for every document the document itself, its prompt, its target and
everything sent to the model. The first difference is named with both values and both files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from streamline_bench.errors import ComparisonError
from streamline_bench.stability.over_tasks import leaf_tasks
from streamline_bench.stability.samples import RunInfo, Samples

_KEY = ["task", "filter", "doc_id"]
_BEFORE = 20  # characters shown before a difference
_HASHES = {
    "doc_hash": ("the document", "use the same data files in the same order for both runs"),
    "prompt_hash": ("the prompt", "use the same prompt template and few-shot seed for both runs"),
    "target_hash": ("the expected answer", "use the same task files for both runs"),
    "request_hash": (
        "what was sent to the model (choices, delimiter or generation arguments)",
        "use the same task files and --gen_kwargs for both runs",
    ),
}


@dataclass(frozen=True)
class AlignedPairs:
    """Two tables with the same rows in the same order, sorted by task, filter and document.

    ``first_filters`` has for each task of the dense run the filter that it names first: the one
    that summaries over tasks use.
    """

    dense: pd.DataFrame
    pruned: pd.DataFrame
    dense_info: RunInfo
    pruned_info: RunInfo
    first_filters: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.dense)


def align(
    dense: Samples,
    pruned: Samples,
    *,
    tasks: Sequence[str] | None = None,
    common_only: bool = False,
) -> AlignedPairs:
    """Pair two runs.

    Args:
        tasks: compare these tasks or groups only; each must be in both runs.
        common_only: without ``tasks``: compare the tasks that both runs have, instead of refusing
            when the sets differ.

    Raises:
        ComparisonError: the runs differ in what they were asked; the first difference is named.
    """
    _same_engine(dense.info, pruned.info)
    chosen = _tasks(dense, pruned, tasks, common_only)
    for task in chosen:
        _same_setting(task, dense.info, pruned.info)
    _same_run_settings(dense.info, pruned.info)
    first, second = _sorted(dense, chosen), _sorted(pruned, chosen)
    for task in chosen:
        _same_documents(
            task,
            first[first["task"] == task],
            second[second["task"] == task],
            dense.info,
            pruned.info,
        )
    for column in _HASHES:
        _same_column(column, first, second, dense.info, pruned.info)
    return AlignedPairs(first, second, dense.info, pruned.info, dense.first_filters)


def _same_engine(dense: RunInfo, pruned: RunInfo) -> None:
    if dense.engine != pruned.engine:
        raise ComparisonError(
            f"The runs differ in engine: '{dense.source}' is of {dense.engine}, '{pruned.source}' "
            f"of {pruned.engine}, which ask and score differently; evaluate both with one."
        )


def _tasks(
    dense: Samples, pruned: Samples, asked: Sequence[str] | None, common_only: bool
) -> list[str]:
    have = {dense.info.run: set(dense.tasks), pruned.info.run: set(pruned.tasks)}
    first, second = set(dense.tasks), set(pruned.tasks)
    if asked is not None:
        wanted = sorted({name for each in asked for name in leaf_tasks(each, dense.info.groups)})
        if not wanted:
            raise ComparisonError(
                f"{', '.join(asked)} of run '{dense.info.run}' holds no task; name tasks instead."
            )
        for run, names in have.items():
            missing = [name for name in wanted if name not in names]
            if missing:
                raise ComparisonError(
                    f"Run '{run}' has no task '{missing[0]}'; it has: {', '.join(sorted(names))}."
                )
        return wanted
    if not first & second:
        raise ComparisonError(
            f"The runs share no task: '{dense.info.run}' has {', '.join(sorted(first))}; "
            f"'{pruned.info.run}' has {', '.join(sorted(second))}."
        )
    if first != second and not common_only:
        only = sorted(first ^ second)[0]
        owner, other = (dense, pruned) if only in first else (pruned, dense)
        reason = other.info.missing.get(only)
        because = f" ({reason})" if reason else ""
        raise ComparisonError(
            f"Only run '{owner.info.run}' has task '{only}'{because}; evaluate both on the same "
            "tasks, name the tasks to compare, or ask for the common ones."
        )
    return sorted(first & second)


def _same_setting(task: str, dense: RunInfo, pruned: RunInfo) -> None:
    for what, first, second in (
        ("version", dense.task_versions.get(task), pruned.task_versions.get(task)),
        ("number of few-shot examples", dense.n_shot.get(task), pruned.n_shot.get(task)),
    ):
        if first != second:
            raise ComparisonError(
                f"Task '{task}' has {what} {first} in run '{dense.run}' and {second} in run "
                f"'{pruned.run}'; evaluate both with the same setting."
            )


def _same_run_settings(dense: RunInfo, pruned: RunInfo) -> None:
    for field, option in (
        ("chat_template", "the same --apply_chat_template and template"),
        ("system_instruction", "the same --system_instruction"),
        ("fewshot_as_multiturn", "the same --fewshot_as_multiturn"),
    ):
        first, second = getattr(dense, field), getattr(pruned, field)
        if first != second:
            raise ComparisonError(
                f"The runs differ in {field.replace('_', ' ')}: {_short(first)} in run "
                f"'{dense.run}' and {_short(second)} in run '{pruned.run}'; evaluate both with "
                f"{option}."
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _sorted(samples: Samples, tasks: list[str]) -> pd.DataFrame:
    frame: pd.DataFrame = samples.frame[samples.frame["task"].isin(tasks)]
    frame = frame.sort_values(_KEY, kind="stable", ignore_index=True)
    twice = frame.duplicated(_KEY)
    if twice.any():
        row = frame[twice].iloc[0]
        raise ComparisonError(
            f"Run '{samples.info.run}' answers document {row['doc_id']} of task '{row['task']}' "
            f"(filter '{row['filter']}') more than once; evaluate again into an empty folder."
        )
    return frame


def _same_documents(
    task: str, first: pd.DataFrame, second: pd.DataFrame, dense: RunInfo, pruned: RunInfo
) -> None:
    filters = set(first["filter"]), set(second["filter"])
    if filters[0] != filters[1]:
        raise ComparisonError(
            f"Task '{task}' has the filters {sorted(filters[0])} in run '{dense.run}' and "
            f"{sorted(filters[1])} in run '{pruned.run}'; use the same task files for both runs."
        )
    counts = first["doc_id"].nunique(), second["doc_id"].nunique()
    if counts[0] != counts[1]:
        raise ComparisonError(
            f"Task '{task}' has {counts[0]} documents in run '{dense.run}' (limit {dense.limit}) "
            f"and {counts[1]} in run '{pruned.run}' (limit {pruned.limit}); "
            f"{_first_different(first, second)}{_files(task, dense, pruned)}; evaluate both on the "
            "same documents."
        )
    same_size = len(first) == len(second)
    if same_size and (first["doc_id"].to_numpy() == second["doc_id"].to_numpy()).all():
        return  # both are sorted by filter and document
    keys = (
        set(zip(first["filter"], first["doc_id"], strict=True)),
        set(zip(second["filter"], second["doc_id"], strict=True)),
    )
    if keys[0] != keys[1]:
        name, document = min(keys[0] ^ keys[1])
        owner = dense.run if (name, document) in keys[0] else pruned.run
        raise ComparisonError(
            f"Document {document} of task '{task}' (filter '{name}') is in run '{owner}' only; "
            "evaluate both on the same documents."
        )


def _first_different(first: pd.DataFrame, second: pd.DataFrame) -> str:
    pairs = zip(first["doc_hash"], second["doc_hash"], strict=False)
    for index, (one, other) in enumerate(pairs):
        if one != other:
            return f"the first difference is document {first['doc_id'].iloc[index]}"
    return f"the first {min(len(first), len(second))} are the same"


def _same_column(
    column: str, first: pd.DataFrame, second: pd.DataFrame, dense: RunInfo, pruned: RunInfo
) -> None:
    differs = (first[column] != second[column]).to_numpy()
    if not differs.any():
        return
    row, other = first[differs].iloc[0], second[differs].iloc[0]
    task = str(row["task"])
    what, advice = _HASHES[column]
    if column == "doc_hash":
        here, there = first["task"] == task, second["task"] == task
        if sorted(first.loc[here, column]) == sorted(second.loc[there, column]):
            what, advice = "the order of the documents", "use the same order for both runs"
    raise ComparisonError(
        f"Task '{task}', document {row['doc_id']}: {what} differs "
        f"({column} {row[column][:12]} in run '{dense.run}', {other[column][:12]} in run "
        f"'{pruned.run}'{_difference(row['prompt'], other['prompt'])}; {int(differs.sum())} of "
        f"{len(first)} rows differ{_files(task, dense, pruned)}); {advice}."
    )


def _difference(first: str, second: str) -> str:
    """Where two prompts begin to differ; empty if they do not."""
    if first == second:
        return ""
    same = len(os.path.commonprefix([first, second]))  # noqa: RUF071 - characters are meant
    begin = max(0, same - _BEFORE)
    return (
        f"; from character {same} of the prompt: {_short(first[begin:])} and "
        f"{_short(second[begin:])}"
    )


def _files(task: str, dense: RunInfo, pruned: RunInfo) -> str:
    if task not in dense.files or task not in pruned.files:
        return ""
    return f"; files {dense.files[task]} and {pruned.files[task]}"
