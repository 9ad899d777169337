"""Looks at a run of ``opencompass tasks/opencompass/bundled.py``: files, figures, stability.

``python check_bundled_run.py WORK_FOLDER``; ends with an error naming what is wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SKILLS = "agreement arithmetic attributes compare counting numbers order pairs story verify".split()


def main(work: Path) -> None:
    run = sorted(each for each in work.iterdir() if each.name[:8].isdigit())[-1]
    accuracy: dict[str, list[float]] = {}
    for model in ("dense", "streamline_none"):
        for skill in (*SKILLS, "recall"):
            for kind in ("predictions", "results"):
                file = run / kind / model / f"streamline_demo_{skill}.json"
                if not file.is_file():
                    raise SystemExit(f"{file} is missing; see OpenCompass's output above.")
            figures = json.loads(file.read_text(encoding="utf-8"))
            accuracy.setdefault(model, []).append(figures.get("accuracy", figures.get("score")))
    means = {model: sum(values) / len(values) for model, values in accuracy.items()}
    print("mean accuracy:", {model: round(value, 2) for model, value in means.items()})
    if not means["dense"] > means["streamline_none"] + 5:
        raise SystemExit("Removing a quarter of the layers should have cost accuracy.")
    folders = [str(run / "predictions" / model) for model in accuracy]
    command = ["streamline-bench", "stability", *folders, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    tasks = json.loads(done.stdout)["tasks"]
    names = {task["task"] for task in tasks}
    wanted = {f"streamline_demo_{skill}" for skill in (*SKILLS, "recall")}
    if names != wanted:
        raise SystemExit(f"Stability was computed for {sorted(names)} only.")
    for task in tasks:
        stability = task["stability"]["value"] if task["stability"] else None
        print(f"{task['task']}: agreement {task['agreement']['value']:.3f}, stability {stability}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
