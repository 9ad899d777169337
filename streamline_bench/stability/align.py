"""Pairs the answers of two runs, and refuses when the runs were not asked the same thing.

Rows are paired by (task, filter, doc_id). Before that, in this order, the runs must agree on: the
engine, the tasks, what computed their answers, their versions and number of shots, chat template
and system instruction, the filters, the documents, and for every document the document itself, its
prompt, its target and everything sent to the model. The first difference is named with both values
and both files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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


def align(
    dense: Samples,
    pruned: Samples,
    *,
    tasks: Sequence[str] | None = None,
    common_only: bool = False,
    across_engines: bool = False,
) -> AlignedPairs:
    """Pair two runs.

    Args:
        tasks: compare these tasks or groups only; each must be in both runs.
        common_only: without ``tasks``: compare the tasks that both runs have, instead of refusing
            when the sets differ.
        across_engines: transformers may have computed one run and vLLM the other.

    Raises:
        ComparisonError: the runs differ in what they were asked; the first difference is named.
    """
    _same_engine(dense.info, pruned.info)
    chosen = _tasks(dense, pruned, tasks, common_only)
    if not across_engines:
        _computed_by_one(chosen, dense.info, pruned.info)
    _same_settings(chosen, dense.info, pruned.info)
    first, second = _sorted(dense, chosen), _sorted(pruned, chosen)
    for task in chosen:
        _same_documents(task, first, second)
    for column in _HASHES:
        _same_column(column, first, second)
    return AlignedPairs(first.frame, second.frame, dense.info, pruned.info, dense.first_filters)


def _same_engine(dense: RunInfo, pruned: RunInfo) -> None:
    if dense.engine != pruned.engine:
        raise ComparisonError(
            f"The runs differ in engine: '{dense.source}' is of {dense.engine}, '{pruned.source}' "
            f"of {pruned.engine}, which ask and score differently; evaluate both with one."
        )


def _computed_by_one(tasks: Sequence[str], dense: RunInfo, pruned: RunInfo) -> None:
    for task in tasks:
        first, second = (info.computed_by.get(task) for info in (dense, pruned))
        if first and second and first != second:
            raise ComparisonError(
                f"Task '{task}' was answered by {first} in run '{dense.run}' and by {second} in "
                f"run '{pruned.run}', so that a difference would be that of the engines too; "
                "evaluate both with one, or compare them by streamline-bench stability "
                "--across-engines."
            )


def _tasks(
    dense: Samples, pruned: Samples, asked: Sequence[str] | None, common_only: bool
) -> list[str]:
    first, second = set(dense.tasks), set(pruned.tasks)
    if asked is not None:
        wanted = sorted({name for each in asked for name in leaf_tasks(each, dense.info.groups)})
        if not wanted:
            raise ComparisonError(
                f"{', '.join(asked)} of run '{dense.info.run}' holds no task; name tasks instead."
            )
        for run, names in ((dense.info.run, first), (pruned.info.run, second)):
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
            "tasks, name those to compare (--task), or ask for the common ones (--common)."
        )
    return sorted(first & second)


def _same_settings(tasks: Sequence[str], dense: RunInfo, pruned: RunInfo) -> None:
    for task in tasks:
        for what, field in (
            ("version", "task_versions"),
            ("number of few-shot examples", "n_shot"),
            ("number of repeats", "repeats"),
        ):
            first, second = (getattr(info, field).get(task) for info in (dense, pruned))
            if field == "repeats" and None in (first, second):
                continue  # samples that an older release read do not say
            if first != second:
                raise ComparisonError(
                    f"Task '{task}' has {what} {first} in run '{dense.run}' and {second} in run "
                    f"'{pruned.run}'; evaluate both with the same setting."
                )
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


def _sorted(samples: Samples, tasks: list[str]) -> Samples:
    frame: pd.DataFrame = samples.frame[samples.frame["task"].isin(tasks)]
    frame = frame.sort_values(_KEY, kind="stable", ignore_index=True)
    twice = frame.duplicated(_KEY)
    if twice.any():
        row = frame[twice].iloc[0]
        raise ComparisonError(
            f"Run '{samples.info.run}' answers document {row['doc_id']} of task '{row['task']}' "
            f"(filter '{row['filter']}') more than once; evaluate again into an empty folder."
        )
    return replace(samples, frame=frame)


def _same_documents(task: str, dense: Samples, pruned: Samples) -> None:
    first, second = (each.frame[each.frame["task"] == task] for each in (dense, pruned))
    here, there = dense.info, pruned.info
    filters = sorted(set(first["filter"])), sorted(set(second["filter"]))
    if filters[0] != filters[1]:
        raise ComparisonError(
            f"Task '{task}' has the filters {filters[0]} in run '{here.run}' and {filters[1]} in "
            f"run '{there.run}'; use the same task files for both runs."
        )
    counts = first["doc_id"].nunique(), second["doc_id"].nunique()
    if counts[0] != counts[1]:
        hashes = enumerate(zip(first["doc_hash"], second["doc_hash"], strict=False))
        place = next((index for index, (one, other) in hashes if one != other), None)
        if place is None:
            difference = f"the first {min(len(first), len(second))} are the same"
        else:
            difference = f"the first difference is document {first['doc_id'].iloc[place]}"
        raise ComparisonError(
            f"Task '{task}' has {counts[0]} documents in run '{here.run}' (limit {here.limit}) "
            f"and {counts[1]} in run '{there.run}' (limit {there.limit}); "
            f"{difference}{_files(task, here, there)}; evaluate both on the same documents."
        )
    keys = [frame.set_index(["filter", "doc_id"]).index for frame in (first, second)]
    if not keys[0].equals(keys[1]):  # both are sorted
        name, document = keys[0].symmetric_difference(keys[1])[0]
        owner = here.run if (name, document) in keys[0] else there.run
        raise ComparisonError(
            f"Document {document} of task '{task}' (filter '{name}') is in run '{owner}' only; "
            "evaluate both on the same documents."
        )


def _same_column(column: str, dense: Samples, pruned: Samples) -> None:
    first, second = dense.frame, pruned.frame
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
        f"({column} {row[column][:12]} in run '{dense.info.run}', {other[column][:12]} in run "
        f"'{pruned.info.run}'{_difference(row['prompt'], other['prompt'])}; {int(differs.sum())} "
        f"of {len(first)} rows differ{_files(task, dense.info, pruned.info)}); {advice}."
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
