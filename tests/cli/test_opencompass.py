"""``streamline-bench opencompass``: the whole way, with a stand-in for OpenCompass's command."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from streamline_bench.cli.main import cli, main
from streamline_bench.opencompass import evaluate as run_folder
from streamline_bench.opencompass import execution

ENTRY = {
    "in-context examples": "",
    "label: 0": {"testing input": "q", "prompt": "q", "PPL": 1.0, "BPB": 1.0},
    "label: 1": {"testing input": "q", "prompt": "q", "PPL": 2.0, "BPB": 1.0},
    "prediction": 0,
    "gold": 0,
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """No OpenCompass: its command writes predictions of all models; returns the configs run."""
    configs: list[Path] = []

    def inspect(python: str) -> execution.Environment:
        return execution.Environment(python, {"opencompass": "0.5.4"}, 0)

    def run(
        environment: execution.Environment, config: Path, folder: Path, **_: object
    ) -> tuple[Path, list[str]]:
        configs.append(config)
        made = folder / "work" / "20300101_000000"
        for label in ("dense", "last_layers", "other"):
            file = made / "predictions" / label / "one.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            entries = {str(i): {**ENTRY, "prediction": int(i == 3)} for i in range(6)}
            for i, entry in enumerate(entries.values()):
                labels = {
                    key: {**value, "prompt": f"q {i} {key}", "testing input": f"q {i} {key}"}
                    for key, value in entry.items()
                    if key.startswith("label")
                }
                entry.update(labels)
            entries["3"]["label: 0"]["PPL"] = 3.0
            file.write_text(json.dumps(entries))
        return made, ["opencompass", str(config)]

    monkeypatch.setattr(execution, "inspect_environment", inspect)
    monkeypatch.setattr(run_folder, "run_opencompass", run)
    return configs


def arguments(model: Path, output: Path, *more: str) -> list[str]:
    recipes = ["--recipes", "dense,last_layers", "--n-layers", "2"]
    return ["opencompass", str(model), *recipes, "-o", str(output), "--quiet", *more]


def test_run_makes_a_report(environment: list[Path], tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = CliRunner().invoke(
        cli, arguments(tiny_llama, output, "--limit", "6", f"other={tiny_llama}")
    )
    assert done.exit_code == 0, done.output
    run = json.loads((output / "run.json").read_text())
    assert run["dense"] == "dense"
    assert [row["label"] for row in run["rows"]] == ["dense", "last_layers", "other"]
    pruned = run["rows"][1]
    assert pruned["recipe"]["name"] == "last_layers"
    assert (Path(pruned["checkpoint"]) / "streamline.json").is_file()
    assert pruned["eval"] == "work/20300101_000000/predictions/last_layers"
    assert (output / "leaderboard.html").is_file()
    assert environment == [(output / "config.py").resolve()]
    source = (output / "config.py").read_text()
    assert "[0:6]" in source
    ast.parse(source)


def test_config_only_writes_nothing_else(
    environment: list[Path], tiny_llama: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    done = CliRunner().invoke(cli, arguments(tiny_llama, output, "--config-only"))
    assert done.output.startswith(f"opencompass {output / 'config.py'} -w ")
    names = sorted(each.name for each in output.iterdir() if not each.name.startswith("."))
    assert names == ["config.py", "opencompass.json"]


def test_a_device_that_is_none_is_refused(tiny_llama: Path) -> None:
    done = CliRunner().invoke(cli, ["opencompass", str(tiny_llama), "--device", "cud", "-o", "x"])
    assert done.exit_code == 2
    assert "'cud' is not a device" in " ".join(done.output.split())


def test_another_run_in_the_same_folder_is_refused(
    environment: list[Path],
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    again = arguments(tiny_llama, output, "--config-only")
    for _ in range(2):
        assert CliRunner().invoke(cli, again).exit_code == 0
    # Nothing has run yet: a corrected command may take the folder.
    assert CliRunner().invoke(cli, [*again, "--limit", "4"]).exit_code == 0
    (output / "work").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main([*again, "--limit", "5"])
    assert stopped.value.code == 2
    assert "give another --output or pass --overwrite" in capsys.readouterr().err
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").touch()
    with pytest.raises(SystemExit):
        main(arguments(tiny_llama, tmp_path / "own", "--overwrite"))
    assert (tmp_path / "own" / "thesis.txt").exists()


def test_mistakes_end_with_a_sentence(
    environment: list[Path],
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for more, sentence in (
        (["--datasets", "hellaswg"], "no data sets called 'hellaswg'"),
        (["--recipes", "dense,streemline"], "streemline"),
        ([f"dense={tiny_llama}"], "Two models are called 'dense'"),
        (["--engine-arg", "a=[1"], "'[1' for 'a' is not a YAML value"),
        (["--engine-arg", "a=b: c: d"], "'b: c: d' for 'a' is not a YAML value"),
        (["--engine-arg", "a"], "--engine-arg: 'a' is not KEY=VALUE"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments(tiny_llama, tmp_path / "run", *more))
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err


def test_config_for_another_machine(tiny_llama: Path, tmp_path: Path) -> None:
    """Nothing is asked of OpenCompass, which need not be installed here."""
    more = ["--config-only", "--gpus", "2", "--python", "/no/such/python", "--engine", "vllm"]
    more += ["--engine-arg", "enforce_eager=true"]
    done = CliRunner().invoke(cli, arguments(tiny_llama, tmp_path / "run", *more))
    assert done.exit_code == 0, done.output
    source = (tmp_path / "run" / "config.py").read_text()
    assert "'run_cfg': {'num_gpus': 2}" in source
    assert "'model_kwargs': {'enforce_eager': True}" in source
    assert "'device'" not in source


def test_environment_without_opencompass(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tiny_llama, tmp_path / "run", "--python", str(tmp_path / "python")))
    assert stopped.value.code == 2
    assert "give --python PATH" in capsys.readouterr().err
    assert Path(sys.executable).exists()
