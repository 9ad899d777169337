"""``streamline-bench stability`` on real outputs of the harness."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from streamline_bench.cli.main import main
from streamline_bench.cli.stability import QUANTITIES, command
from streamline_bench.cli.tables import stability_notes
from streamline_bench.errors import ComparisonError
from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.settings import Settings


def call(*arguments: object) -> Result:
    return CliRunner().invoke(
        command, [str(argument) for argument in arguments], catch_exceptions=False
    )


def test_table(lm_eval_outputs: Path) -> None:
    result = call(lm_eval_outputs / "dense", lm_eval_outputs / "pruned", "--draws", 200)
    assert result.exit_code == 0
    for words in ("toy_mc", "toy_gen (strict)", "mean over tasks", "all documents"):
        assert words in result.output
    assert "cannot tell" in " ".join(result.output.split())
    assert "toy_roll, perplexity per word: " in result.output
    assert "toy_gen (strict): " in result.output
    assert "Not compared" not in result.output


def test_margin_and_noise(lm_eval_outputs: Path, tmp_path: Path) -> None:
    dense, pruned = lm_eval_outputs / "dense", lm_eval_outputs / "pruned"
    again = shutil.copytree(dense, tmp_path / "again")
    result = call(dense, pruned, "--draws", 200, "--margin", 0.9, "--noise", again, "--json")
    printed = json.loads(result.stdout)
    assert printed["margin"] == 0.9
    assert printed["micro"]["decision"] == "no worse than margin"
    micro = printed["micro"]
    flips = micro["flips"]["right_to_wrong"] + micro["flips"]["wrong_to_right"]
    assert micro["noise_flips"] == 0.0
    assert micro["flips_above_noise"]["value"] == pytest.approx(flips / micro["n"])
    shown = call(dense, pruned, "--draws", 200, "--noise", again, "--noise", again)
    assert "% above" in shown.output
    rows = [line for line in shown.output.splitlines() if line[:1] in ("│", "┃")]
    assert len(rows) > 5 and all(line[-1] == line[0] for line in rows)  # none is cut off


def test_two_engines_are_named(lm_eval_outputs: Path, tmp_path: Path) -> None:
    dense = lm_eval_outputs / "dense"
    served = Path(shutil.copytree(lm_eval_outputs / "pruned", tmp_path / "served"))
    (file,) = served.rglob("results_*.json")
    payload = json.loads(file.read_text())
    payload["config"]["model"] = "streamline-vllm"
    file.write_text(json.dumps(payload))
    with pytest.raises(ComparisonError, match="--across-engines"):
        call(dense, served, "--draws", 200)
    result = call(dense, served, "--draws", 200, "--across-engines", "--json")
    assert json.loads(result.stdout)["pruned_run"] == "pruned (vLLM)"
    assert "against pruned (vLLM)" in result.stderr


def test_perplexities_alone(lm_eval_outputs: Path) -> None:
    runs = lm_eval_outputs / "dense", lm_eval_outputs / "pruned"
    shown = call(*runs, "--task", "toy_roll")
    assert shown.exit_code == 0
    assert "No task has right or wrong answers" in shown.output
    assert "toy_roll, perplexity per word: " in shown.output and "nan" not in shown.output
    printed = json.loads(call(*runs, "--task", "toy_roll", "--json").stdout)
    assert printed["macro"] is None and printed["perplexities"][0]["ratio"]["low"] > 0


def test_reasons_from_a_run_are_printable(lm_eval_outputs: Path) -> None:
    samples = load_samples(lm_eval_outputs / "dense", run="dense", progress=False)
    result = compare_answers(samples, samples, settings=Settings(draws=100))
    shown = stability_notes(
        result.model_copy(update={"not_compared": {"t\x1b[1m": "why\x1b[31m\nnot"}})
    )
    assert shown.splitlines()[-1] == "Not compared: t\ufffd[1m (why\ufffd[31m not)."


def test_what_is_not_read_is_printed(lm_eval_outputs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(lm_eval_outputs / "pruned", tmp_path / "pruned"))
    (newest,) = folder.rglob("results_*.json")
    results = json.loads(newest.read_text())
    older = newest.with_name("results_2001-01-01T01-01-01.000001.json")
    older.write_text(json.dumps(results))  # the same evaluation, of which no samples were logged
    result = call(lm_eval_outputs / "dense", folder, "--draws", 100)
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    assert f"Not read of pruned: {older.name} (no samples were logged)." in shown
    assert "Not read of dense" not in shown


def test_acc_norm_leaves_tasks_out(lm_eval_outputs: Path) -> None:
    result = call(
        *(lm_eval_outputs / "dense", lm_eval_outputs / "pruned", "--draws", 200),
        *("--verdict", "acc_norm"),
    )
    assert "Not compared: toy_fill (no right or wrong answers by 'correct_norm')" in result.output


def test_json_and_output_file(lm_eval_outputs: Path, tmp_path: Path) -> None:
    file = tmp_path / "comparison.json"
    result = call(
        *(lm_eval_outputs / "dense", lm_eval_outputs / "pruned", "--draws", 200),
        *("--task", "toy_mc", "--json", "--output", file),
    )
    printed = json.loads(result.stdout)
    assert printed == json.loads(file.read_text())
    assert [task["task"] for task in printed["tasks"]] == ["toy_mc"]
    assert printed["draws"] == 200


def test_reference_script_and_acc_norm(lm_eval_outputs: Path) -> None:
    result = call(
        *(lm_eval_outputs / "dense", lm_eval_outputs / "pruned", "--json"),
        *("--mode", "reference_script", "--verdict", "acc_norm", "--draws", 200),
    )
    printed = json.loads(result.stdout)
    assert printed["mode"] == "reference_script" and printed["ddof"] == 0
    assert printed["tasks"][0]["verdict"] == "acc_norm"


def test_user_errors_end_with_exit_code_2(
    tmp_path: Path, lm_eval_outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ([tmp_path / "none", tmp_path], "There is no file or folder"),
        ([lm_eval_outputs, lm_eval_outputs / "pruned"], "several models"),
        ([lm_eval_outputs / "dense", lm_eval_outputs / "pruned", "--task", "x"], "no task 'x'"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["stability", *map(str, arguments)])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_the_offered_quantities_are_the_known_ones() -> None:
    from typing import get_args

    from streamline_bench.stability.settings import Quantity

    assert list(get_args(Quantity)) == QUANTITIES


@pytest.fixture(scope="module")
def opencompass_runs(opencompass_files: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with one run of two models: two subjects and a benchmark."""
    run = tmp_path_factory.mktemp("outputs") / "20260101_120000"
    for seed, model in enumerate(("dense", "pruned")):
        folder = run / "predictions" / model
        for name in ("cmmlu-art", "cmmlu-law", "piqa"):
            opencompass_files.write(folder, name, opencompass_files.ppl(40, seed=seed))
    return run


def test_opencompass_folders(opencompass_runs: Path) -> None:
    models = opencompass_runs / "predictions"
    result = call(models / "dense", models / "pruned", "--draws", 200)
    assert result.exit_code == 0
    for words in ("piqa", "cmmlu, mean of 2", "cmmlu, documents", "spread of mean_token_nll"):
        assert words in result.output
    alone = call(models / "dense", models / "pruned", "--task", "cmmlu", "--json", "--draws", 200)
    printed = json.loads(alone.stdout)
    assert [task["task"] for task in printed["tasks"]] == ["cmmlu-art", "cmmlu-law"]
    assert printed["quantity"] == "mean_token_nll"


def test_opencompass_errors_end_with_exit_code_2(
    opencompass_runs: Path, lm_eval_outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = opencompass_runs / "predictions"
    for arguments, words in (
        ([opencompass_runs, models / "pruned"], "several models"),
        ([models / "dense", lm_eval_outputs / "pruned"], "differ in engine"),
        ([models / "dense", models / "pruned", "--quantity", "nll"], "choose another quantity"),
        ([models / "dense", models / "pruned", "-o", models / "no" / "a.json"], "make this folder"),
        ([models / "dense", models / "pruned", "-o", models], "is a folder"),
        ([models / "dense", models / "pruned", "--noise", models / "dense"], "DENSE itself"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["stability", *map(str, arguments)])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_an_output_is_refused_before_answers_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in (tmp_path, tmp_path / "no" / "a.json", tmp_path / ("a" * 300)):
        with pytest.raises(SystemExit) as ended:
            main(["stability", "not there", "not there", "-o", str(output)])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert str(output) in said and "--output" in said


def test_the_same_evaluation_twice_is_said(opencompass_runs: Path) -> None:
    dense = opencompass_runs / "predictions" / "dense"
    assert "same evaluation" in call(dense, f"{dense}/../dense", "--draws", 200).stderr
    assert "same evaluation" not in call(dense, dense.with_name("pruned"), "--draws", 200).stderr
