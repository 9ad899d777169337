"""Run folders for the gate: predictions as OpenCompass writes them, and a report of ours."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.report.build import build_report
from streamline_bench.report.run_file import RunFile, RunRow, write_run_file
from streamline_bench.stability.settings import Settings

Change = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def spoil() -> Callable[..., Change]:
    """``spoil(40)`` returns a function that turns the first 40 right answers into wrong ones."""

    def make(count: int) -> Change:
        def change(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
            right = [entry for entry in entries if entry["prediction"] == entry["gold"]]
            for entry in right[:count]:
                entry["prediction"] = next(label for label in "ABCD" if label != entry["gold"])
            return entries

        return change

    return make


@pytest.fixture(scope="session")
def make_run(opencompass_files: Any) -> Callable[..., Path]:
    """Return a function that makes a run folder of a dense and two pruned models.

    ``changes`` maps (label, task) to a function over the entries; ``n`` is the number of questions.
    """

    def make(
        folder: Path,
        *,
        n: int = 300,
        tasks: tuple[str, ...] = ("arc", "piqa"),
        changes: Mapping[tuple[str, str], Change] | None = None,
        failed: Mapping[str, str] | None = None,
        throughput: Mapping[str, Any] | None = None,
    ) -> Path:
        rows = []
        for seed, label in enumerate(("dense", "streamline", "shortgpt")):
            for number, task in enumerate(tasks):
                golds = opencompass_files.gold_labels(n, "ABCD")
                entries = opencompass_files.ppl(n, seed=10 * seed + number, golds=golds)
                right = random.Random(100 * seed + number)
                for entry in entries:  # mostly right, as a model is
                    if right.random() < 0.7 - 0.1 * seed:
                        entry["prediction"] = entry["gold"]
                entries = (changes or {}).get((label, task), list)(entries)
                opencompass_files.write(folder / label / "eval", task, entries)
            reason = (failed or {}).get(label)
            rows.append(RunRow(label=label, eval=f"{label}/eval", failed=reason))
        if throughput is not None:
            (folder / "throughput.json").write_text(json.dumps(throughput))
        speed = "throughput.json" if throughput else None
        write_run_file(folder, RunFile(dense="dense", rows=rows, throughput=speed))
        build_report(folder, settings=Settings(draws=200), progress=False)
        return folder

    return make


@pytest.fixture(scope="session")
def reference_run(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to compare with. Do not modify."""
    return make_run(tmp_path_factory.mktemp("reference"))
