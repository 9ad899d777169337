"""Reads the output folder of lm-eval (0.4.x): ``results_*.json`` and its ``samples_*.jsonl``.

lm-eval writes ``<output_path>/<model name>/results_<timestamp>.json`` and, with ``--log_samples``,
``samples_<task>_<timestamp>.jsonl`` beside it (none for groups). The timestamp ties them together.
Nothing is believed without a check: every task must have its file, every file as many documents as
the results say, and the hash over its rows must be the one in the results.

A folder may hold several evaluations of one model, made task by task, also in folders of their own:
they are read as one run (:func:`_joined`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field
from tqdm import tqdm

from streamline_bench.core.files import read_json
from streamline_bench.errors import SamplesError, few
from streamline_bench.stability.readers.answer_tokens import ANSWER_TOKENS
from streamline_bench.stability.readers.lm_eval_rows import (
    LogFile,
    TaskConfig,
    TaskFacts,
    parse_row,
    with_verdicts,
    without_placeholders,
)
from streamline_bench.stability.samples import Row, RunInfo, Samples, task_hash, well_formed

_RESULTS = re.compile(r"^(?P<stem>.+)_(?P<timestamp>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?)\.json$")
_LONGEST_NAME = 255  # bytes, of a file

_MODEL = ("model", "model_args", "model_name", "model_sha", "model_revision", "peft_sha")
_ASKED = ("version", "examples before a question", "hash of the questions")
_NO_SETTINGS = frozenset({"batch_size", "batch_sizes", "device", "use_cache", "bootstrap_iters",
                           ANSWER_TOKENS})  # fmt: skip
"""Keys of the config that decide speed, place or intervals, or are results, and no answer."""


class _Counts(LogFile):
    effective: int | None = None


class _Results(LogFile):
    """``results_*.json``."""

    results: dict[str, dict[str, Any]]
    configs: dict[str, TaskConfig]
    versions: dict[str, Any]
    n_shot: dict[str, int | str | None] = Field(alias="n-shot")
    n_samples: dict[str, _Counts] = Field(default_factory=dict, alias="n-samples")
    group_subtasks: dict[str, list[str]] = Field(default_factory=dict)
    higher_is_better: dict[str, dict[str, bool | None]] = Field(default_factory=dict)
    task_hashes: dict[str, str] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    chat_template: str | None = None
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None
    model_name: str | None = None
    lm_eval_version: str | None = None
    transformers_version: str | None = None
    seconds: float | None = Field(None, alias="total_evaluation_time_seconds")
    environment: str | None = Field(None, alias="pretty_env_info")

    @property
    def machine(self) -> str | None:
        """The accelerators, or the processor where the model ran on it, as torch names them."""
        on_cpu = str(self.config.get("device") or "cpu").startswith("cpu")
        pattern = r"^Model name: *(.+)$" if on_cpu else r"^GPU \d+: (.+)$"
        named = [name.strip() for name in re.findall(pattern, self.environment or "", re.MULTILINE)]
        counted = (f"{named.count(name)} x {name}" for name in dict.fromkeys(named))
        return ", ".join(name.removeprefix("1 x ") for name in counted) or None

    @property
    def tasks(self) -> list[str]:
        """Tasks that were asked; groups have a version, but no config."""
        return [name for name in self.configs if name in self.versions]

    @property
    def groups(self) -> dict[str, list[str]]:
        """Groups and their tasks; older versions list single tasks as groups without members."""
        return {
            name: members
            for name, tasks in self.group_subtasks.items()
            if (members := [task for task in tasks if task != name])
        }

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything about the run that can change an answer, whatever the task."""
        names = ("chat_template", "system_instruction", "fewshot_as_multiturn", "model_name",
                 "lm_eval_version", "transformers_version")  # fmt: skip
        kept = {key: value for key, value in self.config.items() if key not in _NO_SETTINGS}
        return {**kept, **{name: getattr(self, name) for name in names}}

    def facts(self, task: str) -> TaskFacts:
        """What this file says about a task."""
        return TaskFacts(
            task, str(self.versions[task]), self.configs[task], chat=bool(self.chat_template),
            higher_is_better=self.metrics(task), answer_tokens=self.config.get(ANSWER_TOKENS) or {},
        )  # fmt: skip

    def metrics(self, task: str) -> dict[str, bool | None]:
        """Metrics of a task in the order of its configuration, and whether higher is better."""
        own, said = self.configs[task].higher_is_better, self.higher_is_better.get(task, {})
        return own | {name: own.get(name) if higher is None else higher
                      for name, higher in said.items()}  # fmt: skip


@dataclass(frozen=True)
class _Evaluation:
    """One results file, and the tasks that are read from it."""

    file: Path
    results: _Results
    tasks: tuple[str, ...]

    @property
    def timestamp(self) -> str | None:
        match = _RESULTS.match(self.file.name)
        return match["timestamp"] if match else None

    def samples_file(self, task: str) -> Path:
        """Where a task's samples lie; the error says why they cannot, where the name tells."""
        if self.timestamp is None:
            raise SamplesError(
                f"{self.file}: the name has no timestamp, so its samples cannot be found; keep the "
                "name that lm-eval gave it."
            )
        plain = re.sub(r"\W", "_", task)  # as lm-eval writes some names
        names = [f"samples_{name}_{self.timestamp}.jsonl" for name in (task, plain)]
        usable = [name for name in names if _can_be_a_file(name)]
        found = [path for name in usable if (path := self.file.with_name(name)).is_file()]
        if found:
            return found[0]
        if len(usable) < len(names):
            raise SamplesError(
                f"{self.file}: no file can have the name of task {task[:80]!r}, so that lm-eval "
                "could not save its samples; give the task a short and plain name and evaluate "
                "again."
            )
        raise SamplesError(
            f"{self.file.with_name(usable[0])} is missing; evaluate task '{task}' again with "
            "--log_samples, and keep its output."
        )

    def rows(self, task: str, bar: tqdm[Any]) -> tuple[list[Row], dict[str, bool | None]]:
        """Read a task's samples, and say of its metrics in order whether higher is better.

        Errors are those of :func:`read_lm_eval`.
        """
        file, facts = self.samples_file(task), self.results.facts(task)
        rows = list(_parsed(file, facts, bar))
        if not rows:
            raise SamplesError(
                f"{file} holds no samples: task '{task}' has no questions; check its data and "
                "--limit, or leave the task out."
            )
        _name_filters(rows, facts, file)
        documents, counts = len({row.doc_id for row in rows}), self.results.n_samples.get(task)
        if counts and counts.effective is not None and documents != counts.effective:
            raise SamplesError(
                f"{file} has {documents} documents, the results of task '{task}' were made from "
                f"{counts.effective}; the file looks truncated, evaluate again."
            )
        if self.results.task_hashes.get(task) not in (None, task_hash(rows)):
            raise SamplesError(
                f"{file} does not belong to its results file: the hash of task '{task}' differs; "
                "evaluate again."
            )
        aggregates = self.results.results.get(task, {})
        printed = {name.partition(",")[0]: value for name, value in aggregates.items()}
        higher = self.results.metrics(task)
        joined = without_placeholders(rows, printed, list(higher))
        if joined is not None:
            higher = {joined: True, **higher}
        with_verdicts(rows, higher)
        return rows, higher

    def asked(self, task: str) -> tuple[Any, ...]:
        """What a task was asked: its version, its shots, and a hash over questions and prompts."""
        digest = self.results.task_hashes.get(task)
        if digest is None:
            with tqdm(disable=True) as bar:
                digest = task_hash(self.rows(task, bar)[0])
        return str(self.results.versions[task]), self.results.n_shot.get(task), digest

    def has_samples(self, task: str) -> bool:
        """Whether the task's samples were logged."""
        try:
            return self.samples_file(task).is_file()
        except SamplesError:
            return False


def read_lm_eval(
    path: Path, *, run: str | None = None, timestamp: str | None = None, progress: bool = True
) -> Samples:
    """Read the evaluation that ``path`` means as a samples table.

    Args:
        path: a results file, or a folder that holds the results of one model at any depth. Several
            evaluations of one model with the same settings are joined, also those of other tasks
            in folders of their own.
        timestamp: read this evaluation only.

    Raises:
        SamplesError: files are missing, truncated, foreign or contradict each other; file and line
            are named.
        NumericsError: a log-likelihood is NaN or infinite; the document is named.
    """
    found = [_evaluation(file) for file in _results_files(path, timestamp)]
    _require_one_model(path, found)
    parts, left_out = _joined(path, found)
    if not parts:
        raise SamplesError(
            f"{path} has results but no samples of their tasks; evaluate again with "
            "--log_samples, and keep the whole output."
        )
    wanted = [(part, task) for part in parts for task in part.tasks]
    files = [part.samples_file(task) for part, task in wanted]
    rows: list[Row] = []
    metrics: dict[str, dict[str, bool | None]] = {}
    with tqdm(
        total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True,
        desc="samples", delay=2, disable=not progress,
    ) as bar:  # fmt: skip
        for part, task in wanted:
            found_rows, metrics[task] = part.rows(task, bar)
            rows += found_rows
    names = {task: str(file) for (_, task), file in zip(wanted, files, strict=True)}
    return Samples.from_rows(rows, _run_info(parts, left_out, names, run, metrics))


def _results_files(path: Path, timestamp: str | None) -> list[Path]:
    """The results files that ``path`` means, the newest first."""
    if path.is_file():
        if path.name.startswith("samples_"):
            raise SamplesError(
                f"{path} holds the samples of one task; give the results_<time>.json beside it, or "
                "the folder."
            )
        return [path]
    found = {
        file: match["timestamp"]
        for file in sorted(path.rglob("*.json"))
        if (match := _RESULTS.match(file.name))
    }
    if not found:
        raise SamplesError(
            f"There is no results_<time>.json below '{path}'; give the folder that "
            "lm_eval --output_path names."
        )
    chosen = [file for file, time in found.items() if timestamp in (None, time)]
    if not chosen:
        times = ", ".join(sorted(found.values()))
        raise SamplesError(f"'{path}' has no evaluation of {timestamp}; it has: {times}.")
    return sorted(chosen, key=lambda file: found[file], reverse=True)


def _require_one_model(path: Path, found: Sequence[_Evaluation]) -> None:
    """Refuse folders of which each is another model's (SamplesError: naming them)."""
    folders = sorted({each.file.parent for each in found})
    differing = (_difference(found[0], each) for each in found[1:])
    if len(folders) > 1 and any(key is not None and key[0] in _MODEL for key in differing):
        names = few([f"'{folder}'" for folder in folders])
        raise SamplesError(f"'{path}' holds results of several models ({names}); name one of them.")


def _evaluation(file: Path) -> _Evaluation:
    payload = read_json(file, SamplesError, "the file looks truncated, evaluate again")
    with well_formed(str(file), "a results file of lm-eval", "give one that lm-eval wrote"):
        results = _Results.model_validate(payload)
        return _Evaluation(file, results, tuple(results.tasks))


def _joined(path: Path, found: Sequence[_Evaluation]) -> tuple[list[_Evaluation], dict[str, str]]:
    """The evaluations that are read as one run, the newest first, and why others are left out.

    They were made with the same settings. A task that several in one folder asked the same way
    counts once, from the newest. An evaluation with other settings is left out. If it asked a task
    that is read, it is refused: nobody can know which of the two is meant.

    Raises:
        SamplesError: evaluations of other models, or contradictory ones.
    """
    logged = [each for each in found if any(map(each.has_samples, each.tasks))]
    bare = [each for each in found if each not in logged]
    left_out = {_name(path, each): "no samples were logged" for each in bare if logged}
    newest, *older = logged or found  # of the latter, reading says what is missing
    parts = [newest]
    for evaluation in older:
        differing = _difference(newest, evaluation)
        twice = [task for task in evaluation.tasks for part in parts if task in part.tasks]
        if differing and (twice or differing[0] in _MODEL):
            raise _contradiction(newest, evaluation, " and ".join(map(_shown, differing[1:])),
                                 differing[0])  # fmt: skip
        if differing:
            key, here, there = differing
            left_out[_name(path, evaluation)] = (
                f"{key} is {_shown(there)} there, {_shown(here)} in the newest"
            )
            continue
        for task in twice:
            other = next(part for part in parts if task in part.tasks)
            _require_same_questions(other, evaluation, task)
        if twice:
            reason = f"a newer evaluation has the same tasks ({', '.join(twice)})"
            left_out[_name(path, evaluation)] = reason
        kept = tuple(task for task in evaluation.tasks if task not in twice)
        parts.append(replace(evaluation, tasks=kept))
    return [part for part in parts if part.tasks], left_out


def _name(path: Path, evaluation: _Evaluation) -> str:
    """What tells an evaluation from the others below ``path``."""
    file = evaluation.file
    return str(file.relative_to(path)) if file.parent.parent != path else file.name


def _require_same_questions(newest: _Evaluation, other: _Evaluation, task: str) -> None:
    """Refuse two evaluations of a task of which nobody can know which one is meant."""
    if newest.file.parent != other.file.parent:
        raise _contradiction(newest, other, "each in a folder of its own", f"task '{task}'")
    for what, here, there in zip(_ASKED, newest.asked(task), other.asked(task), strict=True):
        if here != there:
            raise _contradiction(newest, other, f"{what}: {here} and {there}", f"task '{task}'")


def _difference(newest: _Evaluation, other: _Evaluation) -> tuple[str, Any, Any] | None:
    """The first setting that differs, and its two values; those of the model come first."""
    here, there = newest.results.settings, other.results.settings
    for key in (*_MODEL, *sorted({*here, *there} - set(_MODEL))):
        if here.get(key) != there.get(key):
            return key, here.get(key), there.get(key)
    return None


def _shown(value: Any) -> str:
    return f"{value!r:.80}"


def _contradiction(newest: _Evaluation, other: _Evaluation, values: str, what: str) -> SamplesError:
    return SamplesError(
        f"{newest.file} and {_beside(newest, other)} contradict each other in {what} ({values}); "
        "give one of these files instead of the folder, or move the other away."
    )


def _beside(newest: _Evaluation, other: _Evaluation) -> str:
    same = newest.file.parent == other.file.parent
    return f"{other.file.name} beside it" if same else str(other.file)


def _can_be_a_file(name: str) -> bool:
    return Path(name).name == name and "\0" not in name and len(name.encode()) <= _LONGEST_NAME


def _parsed(file: Path, facts: TaskFacts, bar: tqdm[Any]) -> Iterator[Row]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            yield parse_row(line, facts, f"{file}, line {number}")
            bar.update(len(line))


def _name_filters(rows: Sequence[Row], facts: TaskFacts, file: Path) -> None:
    """Name the filters of older versions, whose lines do not: they list them filter by filter."""
    unnamed = [row for row in rows if not row.filter]
    by_document: dict[int, list[Row]] = {}
    for row in unnamed:
        by_document.setdefault(row.doc_id, []).append(row)
    counts = set(map(len, by_document.values()))
    if unnamed and (len(unnamed) < len(rows) or counts != {len(facts.filters)}):
        raise SamplesError(
            f"{file}: the lines do not name their filter, and there are not as many for each "
            f"document as task '{facts.name}' has filters ({', '.join(facts.filters)}); evaluate "
            "again with a newer lm-eval."
        )
    for part in by_document.values():
        for row, name in zip(part, facts.filters, strict=True):
            row.filter = name


def _run_info(
    parts: Sequence[_Evaluation],
    left_out: dict[str, str],
    files: dict[str, str],
    run: str | None,
    metrics: dict[str, dict[str, bool | None]],
) -> RunInfo:
    """What the evaluations say together; each task is described by the one it is read from."""
    newest = parts[0]
    about = newest.results
    limit = about.config.get("limit")
    versions = {"lm_eval": about.lm_eval_version, "transformers": about.transformers_version}

    def of_tasks(name: str) -> dict[str, Any]:
        """The entries of a mapping by task, of a group, or of anything else that is not read."""
        return {
            key: value
            for part in reversed(parts)  # the newest last, so that it wins
            for key, value in getattr(part.results, name).items()
            if key in part.tasks or key not in part.results.tasks
        }

    with well_formed(str(newest.file), "a results file of lm-eval", "evaluate again"):
        return RunInfo(
            run=run or newest.file.parent.name,
            engine="lm-eval",
            engine_version=about.lm_eval_version,
            source=str(newest.file),
            timestamp=newest.timestamp,
            model=about.model_name,
            task_versions={name: str(value) for name, value in of_tasks("versions").items()},
            n_shot=of_tasks("n_shot"),
            task_hashes=of_tasks("task_hashes"),
            groups=of_tasks("groups"),
            chat_template=about.chat_template,
            system_instruction=about.system_instruction,
            fewshot_as_multiturn=about.fewshot_as_multiturn,
            limit=limit if isinstance(limit, int | float) else None,
            config={k: v for k, v in about.config.items() if k != ANSWER_TOKENS},
            results=of_tasks("results"),
            higher_is_better=of_tasks("higher_is_better") | metrics,
            metrics={task: list(names) for task, names in metrics.items()},
            repeats={name: config.repeats for name, config in of_tasks("configs").items()},
            same_questions={
                name: config.same_questions
                for name, config in of_tasks("configs").items()
                if config.same_questions
            },
            data={name: config.data for name, config in of_tasks("configs").items()},
            computed_by={
                task: name
                for part in parts
                for task in part.tasks
                if (name := _computed_by(part.results.config.get("model"))) is not None
            },
            seconds=sum(part.results.seconds or 0 for part in parts) or None,
            machine=about.machine,
            versions={name: value for name, value in versions.items() if value},
            files=files,
            left_out=left_out,
        )


def _computed_by(model: object) -> str | None:
    """What is behind a ``--model`` of the harness."""
    if not isinstance(model, str):
        return None
    if model in ("streamline", "hf", "huggingface", "hf-auto", "hf-multimodal"):
        return "transformers"
    return "vLLM" if model in ("streamline-vllm", "vllm", "vllm-vlm") else model
