"""A stand-in for OpenCompass's command, for tests of what surrounds it.

Put under the name ``opencompass/cli/main.py`` into a folder on ``PYTHONPATH``. Writes the tree that
OpenCompass 0.5.4 writes; ``$FAKE`` says what goes wrong, after which it still ends with code 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

CONFIG = """
datasets = [dict(abbr='one'), dict(abbr='two', n=1)]
models = [dict(abbr='dense', path='x'), dict(abbr='pruned', path='x')]
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("-w", "--work-dir")
    parser.add_argument("-r", "--reuse", default="20300101_000000")
    parser.add_argument("--debug", action="store_true")
    arguments = parser.parse_args()
    fault = os.environ.get("FAKE", "")
    print("started in", Path.cwd().name, "debug", arguments.debug)
    if fault == "start":
        raise ModuleNotFoundError("No module named 'zebra'")
    if fault == "sleep":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], check=True)
    run = Path(arguments.work_dir) / arguments.reuse
    (run / "configs").mkdir(parents=True, exist_ok=True)
    (run / "configs" / "a.py").write_text(CONFIG)
    for model in ("dense", "pruned"):
        for name in ("one", "two"):
            for kind in ("predictions", "results"):
                file = run / kind / model / f"{name}.json"
                if file.exists() or (fault, model, name) == (f"no {kind}", "pruned", "two"):
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                error = {"error": "no pen"} if fault == "error" and kind == "results" else {}
                file.write_text(json.dumps({"0": {"made": os.environ.get("ROUND", "1")}, **error}))
    for part in ("infer", "eval"):
        log = run / "logs" / part / "pruned" / "one.out"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"Traceback\n  line\nValueError: {part} broke\nbye\n")


if __name__ == "__main__":
    main()
