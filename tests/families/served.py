"""Does vLLM answer as transformers does, dense and pruned? Adds a column to ``families.json``.

    python tests/families/served.py [--types llama,jamba] [--work FOLDER]

In the environment of ``tox -e vllm``. For every causal LM that vLLM's registry serves, a small
random model with heads of 32 and its copy without two layers are served in float32 on the CPU, and
their greedy tokens are compared with transformers'. A cell is ``same``, or says why it is not:
``not served`` with the engine's message, ``other`` where the dense model has other tokens already,
``wrong`` where only the pruned one has. Finished model types are kept in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from families import matrix  # noqa: E402

TOKENS = 8
WIDER = 4
"""Heads of 32 instead of 8: the least that the engine has."""
KINDS = ("dense", "last_layers")
TOGETHER = 8
"""Model types that one engine process serves, one after the other."""


def make(model_type: str, work: Path) -> None:
    """Save the model and its pruned copy, and what transformers generates with each."""
    try:
        dense = matrix.tiny_folder(model_type, work / model_type / "dense", WIDER)
        matrix._compress(dense, "last_layers", work / model_type / "last_layers")
        expected: Any = {kind: _tokens(work / model_type / kind) for kind in KINDS}
    except Exception as error:
        expected = {"error": matrix._line(error)}
    (work / model_type / "expected.json").write_text(json.dumps(expected))


def _tokens(folder: Path) -> list[list[int]]:
    model, _ = matrix._load(folder)
    ids = matrix._ids()
    found = model.generate(
        ids, attention_mask=ids.new_ones(ids.shape), do_sample=False, max_new_tokens=TOKENS,
        min_new_tokens=TOKENS, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    tokens: list[list[int]] = found[:, ids.shape[1] :].tolist()
    return tokens


def _made(model_type: str, work: Path) -> dict[str, Any]:
    """Make it in a process of its own: some types crash hard."""
    (work / model_type).mkdir(parents=True, exist_ok=True)
    maker = multiprocessing.get_context("fork").Process(target=make, args=(model_type, work))
    maker.start()
    maker.join()
    path = work / model_type / "expected.json"
    lost = {"error": "the process ended"}
    return dict(json.loads(path.read_text()) if path.exists() else lost)


def _cell(model_type: str, work: Path) -> Path:
    return work / model_type / "cell.json"


def serve(types: Sequence[str], work: Path) -> dict[str, Any]:
    """Return the engine's answers by type and kind, from one process for all the types.

    Where it ends early, another goes on behind the model that ended it.
    """
    waiting = [f"{name}/{kind}" for name in types for kind in KINDS]
    answers: dict[str, Any] = {}
    script = ROOT / "tests" / "modeling" / "vllm" / "serve_models.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    while waiting:
        jobs, found = work / "jobs.json", work / "answers.json"
        models = {key: {"model": str(work / key)} for key in waiting}
        prompts = matrix._ids().tolist()
        jobs.write_text(json.dumps({"prompts": prompts, "tokens": TOKENS, "models": models}))
        found.write_text("{}")
        with (work / "engine.log").open("w") as log:
            subprocess.run(
                [sys.executable, str(script), str(jobs), str(found)],
                stdout=log, stderr=log, check=False, env=environment,
            )  # fmt: skip
        new = json.loads(found.read_text())
        if len(new) < len(waiting):
            new[waiting[len(new)]] = {"error": "the engine's process ended"}
        answers |= new
        waiting = [key for key in waiting if key not in answers]
    return {name: {kind: answers[f"{name}/{kind}"] for kind in KINDS} for name in types}


def verdict(expected: dict[str, Any], answers: dict[str, Any]) -> str:
    """Return the cell of one model type."""
    if "error" in expected:
        return f"not tried: {expected['error']}"
    if "error" in answers["dense"]:
        return f"not served: {' '.join(answers['dense']['error'].split())[:400]}"
    if answers["dense"]["tokens"] != expected["dense"]:
        return "other: tokens of the dense model"
    pruned = answers["last_layers"]
    if "error" in pruned:
        return f"wrong: {' '.join(pruned['error'].split())[:400]}"
    return "same" if pruned["tokens"] == expected["last_layers"] else "wrong: tokens"


def main() -> int:
    """Fill the column; the exit code is 1 where a pruned model is served wrongly."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--types", help="model types, by commas; all that vLLM serves unless given")
    parser.add_argument("--work", type=Path, help="folder that keeps finished model types")
    asked = parser.parse_args()

    import streamline_bench.compression
    import streamline_bench.harness.lm  # noqa: F401 - imported once, before the forks
    from streamline_bench.modeling.vllm.stock_routes import ask_registry

    known = ask_registry()
    named = asked.types.split(",") if asked.types else None
    types = named or [name for name, route in known["routes"].items() if route != "none"]
    work = asked.work or Path(tempfile.mkdtemp())
    cells = {}
    for start in range(0, len(types), TOGETHER):
        batch = types[start : start + TOGETHER]
        expected = {name: _made(name, work) for name in batch if not _cell(name, work).exists()}
        sound = [name for name, tokens in expected.items() if "error" not in tokens]
        answers = serve(sound, work)
        for name, tokens in expected.items():
            _cell(name, work).write_text(json.dumps(verdict(tokens, answers.get(name, {}))))
        for name in batch:
            cell = json.loads(_cell(name, work).read_text())
            cells[name] = cell.replace(f"{work / name}/", "MODEL/")
            print(f"{name}: {cells[name]}", flush=True)
            shutil.rmtree(work / name / "dense", ignore_errors=True)
            shutil.rmtree(work / name / "last_layers", ignore_errors=True)
    payload = json.loads(matrix.COMMITTED.read_text("utf-8"))
    before = payload.get("served", {}).get("cells", {})
    payload["served"] = {"vllm": known["vllm"], "cells": dict(sorted({**before, **cells}.items()))}
    matrix.write(payload)
    return int(any(cell.startswith("wrong") for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
