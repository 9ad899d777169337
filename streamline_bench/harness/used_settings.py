"""What the harness really used, from the results that it wrote, against what was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.errors import few


class Asked(Protocol):
    """What an evaluation is asked, as the options of the harness name it."""

    @property
    def num_fewshot(self) -> int | None: ...
    @property
    def limit(self) -> float | None: ...
    @property
    def apply_chat_template(self) -> bool | str: ...
    @property
    def batch_size(self) -> str: ...
    @property
    def dtype(self) -> str | None: ...


class UsedSettings(Frozen):
    """Settings of an evaluation, as its ``results_*.json`` records them.

    Attributes:
        num_fewshot: task -> examples before each question.
        documents: task -> documents that were asked.
        chat_template: whether one was applied.
        seeds: of random, numpy, torch and the choice of examples.
    """

    num_fewshot: dict[str, int]
    documents: dict[str, int]
    limit: float | None
    chat_template: bool
    system_instruction: str | None
    gen_kwargs: Any
    batch_size: str
    dtype: str | None
    device: str | None
    seeds: dict[str, Any]


def used_settings(folder: Path) -> UsedSettings | None:
    """Read the newest results below a folder; None where there are none that can be read."""
    found = max(folder.rglob("results_*.json"), default=None, key=lambda path: path.name)
    if found is None:
        return None
    results: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    config, tasks = results.get("config", {}), results.get("configs", {})
    samples = results.get("n-samples", {})
    dtype = config.get("model_dtype")
    return UsedSettings(
        # What the task itself says: the harness may write the number that was asked for.
        num_fewshot={name: int(task.get("num_fewshot") or 0) for name, task in tasks.items()},
        documents={
            name: int(samples[name].get("effective", 0)) for name in tasks if name in samples
        },
        limit=config.get("limit"),
        chat_template=bool(results.get("chat_template")),
        system_instruction=results.get("system_instruction"),
        gen_kwargs=config.get("gen_kwargs"),
        batch_size=str(config.get("batch_size")),
        dtype=str(dtype).removeprefix("torch.") if dtype else None,
        device=config.get("device"),
        seeds={key: value for key, value in config.items() if key.endswith("_seed")},
    )


def merged_settings(found: Sequence[UsedSettings]) -> UsedSettings | None:
    """Return the first ones with the examples and documents of all; None where there are none."""
    if not found:
        return None
    by_task = {
        "num_fewshot": {k: v for each in found for k, v in each.num_fewshot.items()},
        "documents": {k: v for each in found for k, v in each.documents.items()},
    }
    return found[0].model_copy(update=by_task)


def ignored_options(asked: Asked, used: UsedSettings) -> list[str]:
    """Return a sentence for each option of the evaluation that the harness did not follow."""
    said = []
    if asked.num_fewshot is not None:
        others = {n: k for n, k in used.num_fewshot.items() if k != asked.num_fewshot}
        said += _sentence(f"--num-fewshot {asked.num_fewshot}", "examples", others)
    if asked.limit is not None and asked.limit >= 1:
        more = {n: k for n, k in used.documents.items() if k > asked.limit}
        said += _sentence(f"--limit {asked.limit:g}", "documents", more)
    if asked.apply_chat_template and not used.chat_template:
        said.append("--apply-chat-template had no effect: no template was applied.")
    if asked.batch_size.isdigit() and used.batch_size not in (asked.batch_size, "None"):
        said.append(f"--batch-size {asked.batch_size} had no effect: it was {used.batch_size}.")
    if asked.dtype and used.dtype and not _same_dtype(asked.dtype, used.dtype):
        said.append(f"--dtype {asked.dtype} had no effect: the model was in {used.dtype}.")
    return said


def _sentence(option: str, what: str, others: Mapping[str, int]) -> list[str]:
    if not others:
        return []
    named = few([f"{task} {number}" for task, number in others.items()])
    return [f"{option} had no effect on {len(others)} tasks; {what} used: {named}."]


def _same_dtype(one: str, other: str) -> bool:
    short = {"half": "float16", "float": "float32"}
    names = [name.removeprefix("torch.") for name in (one, other)]
    return "auto" in names or len({short.get(name, name) for name in names}) == 1
