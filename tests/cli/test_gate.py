"""``streamline-bench gate``: exit codes, files, and what GitHub Actions shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.report.build import build_report
from streamline_bench.report.run_file import RunFile, RunRow, write_run_file
from streamline_bench.stability.settings import Settings


@pytest.fixture(scope="module")
def runs(opencompass_files: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and one whose pruned model lost most of its right answers."""
    made = []
    for name in ("good", "bad"):
        folder = tmp_path_factory.mktemp(name)
        for seed, label in enumerate(("dense", "pruned")):
            entries = opencompass_files.ppl(200, seed=seed)
            for number, entry in enumerate(entries):
                if number % 3:
                    entry["prediction"] = entry["gold"]
                if name == "bad" and label == "pruned" and number % 2:
                    entry["prediction"] = next(x for x in "ABCD" if x != entry["gold"])
            opencompass_files.write(folder / label, "arc", entries)
        rows = [RunRow(label=label, eval=label) for label in ("dense", "pruned")]
        write_run_file(folder, RunFile(dense="dense", rows=rows))
        build_report(folder, settings=Settings(draws=100), progress=False)
        made.append(folder)
    return made[0], made[1]


def test_open_and_closed(call: Callable[..., Any], runs: tuple[Path, Path]) -> None:
    good, bad = runs
    same = call("gate", good, "--against", good, "--draws", 200)
    assert same.code == 0 and "Gate open" in same.out and "itself" in same.err
    every = call("gate", good, "--against", good, "--draws", 200, "--all")
    assert every.code == 0 and every.out.count("arc") >= 3
    lost = call("gate", bad, "--against", good, "--draws", 200)
    assert lost.code == 1 and "Gate closed" in lost.out and "regressed" in lost.out


def test_reference_file_and_json(
    call: Callable[..., Any], runs: tuple[Path, Path], tmp_path: Path
) -> None:
    good, bad = runs
    reference, output = tmp_path / "reference.json", tmp_path / "gate.json"
    written = call("gate", good, "--write-reference", reference)
    assert written.code == 0
    for counted in ("reference.json", "2 rows", "2 results", "0 with speed"):
        assert counted in written.out
    before = reference.read_bytes()
    again = call("gate", bad, "--write-reference", reference)
    assert again.code == 2 and "reference.json exists" in again.err and "--overwrite" in again.err
    assert reference.read_bytes() == before
    quiet = call("gate", good, "--write-reference", reference, "--overwrite", "--quiet")
    assert (quiet.code, quiet.out) == (0, "") and reference.read_bytes() == before
    arguments = ("--against", reference, "--draws", 200, "--json", "-o", output, "--quiet")
    ended = call("gate", bad, *arguments)
    assert ended.code == 1
    printed = json.loads(ended.out)
    assert printed == json.loads(output.read_text())
    assert printed["kind"] == "streamline-bench gate"
    assert call("gate", bad, *arguments, "--row", "dense").code == 0


@pytest.mark.parametrize(
    "option", [("--row", "dense"), ("-o", "gate.json"), ("--json",), ("--strict",), ("--seed", "0")]
)
def test_a_reference_is_not_a_comparison(
    call: Callable[..., Any], runs: tuple[Path, Path], tmp_path: Path, option: tuple[str, ...]
) -> None:
    ended = call("gate", runs[0], "--write-reference", tmp_path / "r.json", *option)
    assert ended.code == 2
    assert "no effect" in ended.err and "--write-reference" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_github(
    call: Callable[..., Any],
    runs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    ended = call("gate", runs[1], "--against", runs[0], "--draws", 200)
    assert "\n::error title=pruned%2C arc%3A accuracy::" in ended.out
    assert "**Gate closed" in (tmp_path / "summary.md").read_text()
    json.loads(call("gate", runs[1], "--against", runs[0], "--draws", 200, "--json").out)


def test_user_errors(call: Callable[..., Any], runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert call("gate", runs[0]).code == 2
    assert call("gate", runs[0], "--against", runs[0], "--write-reference", tmp_path).code == 2
    idle = call("gate", runs[0], "--against", runs[0], "--overwrite")
    assert idle.code == 2 and "--overwrite" in idle.err and "no effect" in idle.err
    missing = call("gate", tmp_path, "--against", runs[0])
    assert missing.code == 2 and "leaderboard.json" in missing.err
    wrong = call("gate", runs[0], "--against", runs[0], "--row", "prunde")
    assert wrong.code == 2 and "did you mean 'pruned'" in wrong.err


def test_inputs_are_checked_before_answers_are_read(
    call: Callable[..., Any],
    runs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers may take a minute to read; a wrong path or label is known at once."""

    def read(*given: object, **options: object) -> None:
        raise AssertionError("answers were read")

    monkeypatch.setattr("streamline_bench.gate.evidence.load_samples", read)
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    for arguments, named in (
        (("--against", tmp_path / "missing.json"), "missing.json"),
        (("--against", damaged), "damaged.json"),
        (("--against", runs[1], "--row", "prunde"), "prunde"),
        (("--against", runs[1], "-o", tmp_path / "no" / "gate.json"), "gate.json"),
        (("--write-reference", tmp_path / "no" / "reference.json"), "reference.json"),
    ):
        ended = call("gate", runs[0], *arguments)
        assert ended.code == 2 and named in ended.err, ended.err
    both = call("gate", tmp_path / "no-run", "--against", damaged)
    assert both.code == 2 and "damaged.json" in both.err, "the reference is read first"


def test_a_history_grows_with_what_passes(
    call: Callable[..., Any], make_throughput: Any, tmp_path: Path
) -> None:
    history, run = tmp_path / "history", tmp_path / "throughput.json"
    for day in range(4):
        created = f"2026-01-0{day + 1}T00:00:00+00:00"
        run.write_text(json.dumps(make_throughput(created=created)))
        ended = call("gate", run, "--history", history, "--keep", "--strict")
        assert ended.code == int(day < 3), ended.err
    assert len(list(history.glob("*.json"))) == 4
    again = call("gate", run, "--history", history, "--keep")
    assert again.code == 0 and len(list(history.glob("*.json"))) == 4, "the same run"
    run.write_text(json.dumps(make_throughput(dense=50.0, created="2026-02-01T00:00:00+00:00")))
    worse = call("gate", run, "--history", history, "--keep")
    assert worse.code == 1 and "regressed" in worse.out
    assert len(list(history.glob("*.json"))) == 4, "what fails is no measure"


def test_a_run_without_speeds_is_not_kept(
    call: Callable[..., Any], runs: tuple[Path, Path], tmp_path: Path
) -> None:
    history = tmp_path / "history"
    ended = call("gate", runs[0], "--against", runs[1], "--history", history, "--keep")
    assert ended.code == 2 and "leave --keep out" in ended.err
    assert not history.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--against"),
        (("--base", "dense", "--confidence", "nan"), "'nan' is not a finite number"),
        (("--base", "dense", "--against", "x"), "leave out --against"),
        (("--base", "dense", "--keep"), "it needs --history"),
        (("--base", "dense", "--accuracy-margin", "0.1"), "it needs --against"),
        (("--history", "nowhere"), "nowhere"),
    ],
)
def test_what_speeds_are_compared_with(
    call: Callable[..., Any], make_throughput: Any, tmp_path: Path, options: Any, message: str
) -> None:
    run = tmp_path / "throughput.json"
    run.write_text(json.dumps(make_throughput()))
    ended = call("gate", run, *options)
    assert ended.code == 2 and message in ended.err
    assert call("gate", run, "--base", "dense").code == 0
