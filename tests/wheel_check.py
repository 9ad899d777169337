"""Install the built wheel into a clean environment outside the checkout, and use it there.

Usage: python tests/wheel_check.py DIST_FOLDER WORK_FOLDER
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command, show it, and return what it printed; stop at the first failure."""
    print("$", *command, flush=True)
    # The checkout must not be found by accident.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE
    )
    print(done.stdout[-3000:], flush=True)
    if done.returncode:
        sys.exit(f"{command[0]} ended with {done.returncode}")
    return done.stdout


def check_names(wheel: Path) -> None:
    """Refuse a wheel with files that only the repository needs: tests, documentation, the code and
    the log of the bundled model's training, rendered reports."""
    names = zipfile.ZipFile(wheel).namelist()
    if not any(name.endswith("demo/model/model.safetensors") for name in names):
        sys.exit("the bundled model is not in the wheel")
    unwanted = re.compile(
        r"bundled_model/|training_log|figures\.json|(^|/)tests/|reports/docs|leaderboard\.(html|json)$"
    )
    found = [name for name in names if unwanted.search(name)]
    if found:
        sys.exit(f"the wheel holds files of the repository only: {', '.join(found)}")


def main(dist: Path, work: Path) -> None:
    """Check the one wheel in ``dist`` from inside ``work``."""
    wheels = list(dist.glob("streamline_bench-*.whl"))
    if len(wheels) != 1:
        sys.exit(f"{dist} holds {len(wheels)} wheels, expected one; remove the old ones")
    check_names(wheels[0])
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    venv.create(work / "env", with_pip=True)
    binaries = work / "env" / "bin"
    run(binaries / "pip", "install", "-q", "--no-compile", wheels[0], cwd=work)
    command = binaries / "streamline-bench"
    if "demo" not in run(command, "--help", cwd=work):
        sys.exit("--help does not name the demo")
    if "streamline_ffn_res" not in run(command, "recipes", cwd=work):
        sys.exit("the recipes are not in the wheel")
    if "streamline_demo" not in run(command, "tasks", cwd=work):
        sys.exit("the tasks are not in the wheel")
    if not (Path(run(command, "tasks", "--path", cwd=work).strip()) / "bundled").is_dir():
        sys.exit("the folder of the tasks is not in the wheel")
    run(
        binaries / "lm_eval", "--model", "streamline", "--model_args", "pretrained=bundled",
        "--tasks", "streamline_demo", "--limit", "4", cwd=work,
    )  # fmt: skip
    run(
        command, "demo", "--output", work / "run", "--rows", "dense,streamline_none",
        "--limit", "8", cwd=work,
    )  # fmt: skip
    if "streamline_none" not in (work / "run" / "leaderboard.html").read_text(encoding="utf-8"):
        sys.exit("the report lacks a row of the demo")
    run(
        command, "compare", "--plan", "bundled", "--recipes", "last_layers", "--until", "compress",
        "--output", work / "plan", cwd=work,
    )  # fmt: skip
    if not (work / "plan" / "last_layers" / "checkpoint" / "streamline.json").exists():
        sys.exit("the plan that comes along was not carried out")
    shutil.rmtree(work)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
