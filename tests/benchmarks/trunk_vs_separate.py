"""Dense and four depth-pruned variants: one shared walk against five separate runs of lm_eval.

Two figures per case, both in CPU seconds (of the process and its children):

- ``runs``: five processes of the stock command ``lm_eval --model streamline`` against one
  with one call of ``score_together``, from start to written files. The files are compared:
  samples byte by byte, results without dates and durations.
- ``scoring``: the same requests within one process, models loaded and tasks built beforehand, so
  that what is left is the models' work. The answers are compared bit by bit.

What a walk saves depends on where the removed block lies: a variant of L layers less n, cut at
layer s, still has to run L - s - n layers, its final norm and its LM head. Cases:

- ``deep``: blocks that end one or two layers below the top, where scans put them in large models
  (25 % of Llama-2-7B: layers 21 to 29 of 32);
- ``chosen``: the blocks that the scan chooses on the bundled model, one for each of four sizes;
- ``middle``: blocks in the middle of the stack.

The exit code is 1 if ``runs`` (``scoring`` with ``--skip-runs``) of a case are less than
``--target`` times as fast, where its layers allow for that: a case whose ``layers_ratio`` is lower
is shown only.

    OMP_NUM_THREADS=1 python tests/benchmarks/trunk_vs_separate.py [--model 15m] [--cases deep ...]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

LAYERS = 12
TARGET = 2.5
CASES: dict[str, list[tuple[int, int, str | None]]] = {
    # start of the block, its layers, network in its place
    "deep": [(8, 3, None), (8, 3, "ffn"), (8, 3, "swiglu_res"), (7, 3, None)],
    "chosen": [(4, 3, None), (4, 3, "swiglu_res"), (3, 4, None), (5, 2, None)],
    "middle": [(4, 3, None), (4, 3, "ffn"), (5, 3, None), (5, 3, "ffn")],
}
TOGETHER = """
import sys
from pathlib import Path
from streamline_bench.harness.trunk.request import TrunkRequest
from streamline_bench.harness.trunk.score import score_together
score_together(TrunkRequest.model_validate_json(Path(sys.argv[1]).read_text()))
"""
TASK = """
task: trunk_benchmark
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
num_fewshot: 0
metric_list: [{{metric: acc}}]
metadata: {{version: 1.0}}
"""
TIMES = {"date", "git_hash", "pretty_env_info", "total_evaluation_time_seconds", "upper_git_hash"}


def build_dense(model: str, folder: Path) -> Path:
    """Return the bundled model, or save a random Llama of twelve layers."""
    if model == "bundled":
        from streamline_bench.demo import model as bundled

        return bundled()
    import scoring_vs_hf

    scoring_vs_hf.SIZES["trunk"] = {**scoring_vs_hf.SIZES[model], "num_hidden_layers": LAYERS}
    scoring_vs_hf.VOCABULARY = 4000
    with quiet():
        scoring_vs_hf.build_model(folder, "trunk")
    return folder


def build_variant(dense: Path, folder: Path, start: int, n: int, network: str | None) -> Path:
    """Save ``dense`` without layers ``start .. start + n - 1``, with a random network instead."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from surgery_in_memory import keep_layers
    from transformers import AutoModelForCausalLM

    from streamline_bench.core.surgery import block_keep
    from streamline_bench.modeling import Attachment, StreamlineForCausalLM, streamline_config

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(dense)
        keep_layers(model, block_keep(LAYERS, start, n))
        if network is not None:
            torch.manual_seed(0)
            width = model.config.intermediate_size
            config = streamline_config(model.config, [Attachment(start - 1, network, width)])
            hosted = StreamlineForCausalLM.from_config(config)
            hosted.load_state_dict(model.state_dict(), strict=False)
            model = hosted
        model.save_pretrained(folder)
    for path in dense.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def build_task(folder: Path, questions: int, vocabulary: int) -> str:
    """Write a task of four choices of 3 to 9 words behind contexts of 30 to 90; return its name."""
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        count = draw.randint(least, most)
        return " ".join(f"w{draw.randrange(vocabulary)}" for _ in range(count))

    rows = [
        {"query": words(30, 90), "choices": [words(3, 9) for _ in range(4)], "gold": i % 4}
        for i in range(questions)
    ]
    file = folder / "documents.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "trunk_benchmark.yaml").write_text(TASK.format(file=file))
    return "trunk_benchmark"


@contextlib.contextmanager
def quiet() -> Any:
    """No progress bars of libraries."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def cpu_of(command: list[str], log: Path) -> float:
    """Run a command and return the CPU seconds of it and its children."""
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w") as stream:
        subprocess.run(command, stdout=stream, stderr=stream, check=True)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime


def make_request(
    checkpoints: Mapping[str, Path], output: Path, task: str, tasks: Path, limit: int | None
) -> Any:
    from streamline_bench.harness.trunk.request import TrunkRequest

    return TrunkRequest(
        checkpoints=dict(checkpoints),
        outputs={label: output / label for label in checkpoints},
        tasks=(task,),
        include_path=tasks,
        limit=limit,
        batch_size=16,
        device="cpu",
        dtype="float32",
    )


def whole_runs(request: Any, scratch: Path) -> dict[str, float]:
    """CPU seconds of five processes and of one; the files must agree."""
    separate = 0.0
    for label, checkpoint in request.checkpoints.items():
        command = [
            sys.executable, "-m", "lm_eval", "run",
            "--model", "streamline",
            "--model_args", f"pretrained={checkpoint},dtype=float32",
            "--include_path", str(request.include_path),
            "--tasks", ",".join(request.tasks),
            "--batch_size", str(request.batch_size),
            "--device", "cpu",
            "--log_samples",
            "--output_path", str(scratch / "separate" / label),
        ]  # fmt: skip
        if request.limit is not None:
            command += ["--limit", str(request.limit)]
        separate += cpu_of(command, scratch / f"{label}.log")
    (scratch / "request.json").write_text(request.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-c", TOGETHER, str(scratch / "request.json")]
    together = cpu_of(command, scratch / "together.log")
    for label in request.checkpoints:
        require_same_files(scratch / "separate" / label, request.outputs[label])
    shutil.rmtree(scratch / "separate")
    for output in request.outputs.values():
        shutil.rmtree(output)
    return {"separate": separate, "together": together}


def require_same_files(first: Path, second: Path) -> None:
    """Stop unless two outputs say the same."""
    ours, theirs = (
        {p.name.rsplit("_", 1)[0] + p.suffix: p for p in folder.rglob("*_20*") if p.is_file()}
        for folder in (first, second)
    )
    if not ours or ours.keys() != theirs.keys():
        raise SystemExit(f"{first} and {second} have other files")
    for name, path in ours.items():
        if path.suffix == ".jsonl":
            same = path.read_bytes() == theirs[name].read_bytes()
        else:
            kept = [
                {k: v for k, v in json.loads(file.read_text()).items() if k not in TIMES}
                for file in (path, theirs[name])
            ]
            same = kept[0] == kept[1]
        if not same:
            raise SystemExit(f"{path} and {theirs[name]} differ")


def scoring_alone(request: Any, repeats: int) -> dict[str, float]:
    """CPU seconds of the models' own work, separate and together; the answers must agree."""
    from streamline_bench.harness.lm import StreamlineLM
    from streamline_bench.harness.trunk.assembly import assemble
    from streamline_bench.harness.trunk.stack import read_stack, walks_of

    instances = requests_of(request)
    options = {"device": "cpu", "dtype": "float32", "batch_size": request.batch_size}
    with quiet():
        lone = {
            label: StreamlineLM(str(folder), **options)
            for label, folder in request.checkpoints.items()
        }
        stacks = {label: read_stack(folder) for label, folder in request.checkpoints.items()}
        (order,) = walks_of(stacks)
        party = assemble(request, order, stacks, progress=False)
    assert party.walk is not None
    seconds: dict[str, list[float]] = {"separate": [], "together": []}
    for model in [*lone.values(), *party.models.values()]:
        model.loglikelihood(instances[:8], disable_tqdm=True)  # Warm-up.
    for _ in range(repeats):
        begin = time.process_time()
        expected = {k: m.loglikelihood(instances, disable_tqdm=True) for k, m in lone.items()}
        middle = time.process_time()
        party.walk._kept.clear()
        found = {
            k: party.models[k].loglikelihood(instances, disable_tqdm=True)
            for k in request.checkpoints
        }
        seconds["together"].append(time.process_time() - middle)
        seconds["separate"].append(middle - begin)
        if found != expected:
            raise SystemExit("answers differ")
    return {name: statistics.median(values) for name, values in seconds.items()}


def requests_of(request: Any) -> list[Any]:
    """The requests that the harness builds for the tasks."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(request.include_path), include_defaults=False)
    instances: list[Any] = []
    with quiet():
        for task in manager.load(list(request.tasks))["tasks"].values():
            task.build_all_requests(limit=None if request.limit is None else int(request.limit))
            instances += task.instances
    return instances


def ideal(case: str) -> float:
    """Layers of five separate models, over those of one walk (heads and networks left out)."""
    blocks = CASES[case]
    separate = LAYERS + sum(LAYERS - n for _, n, _ in blocks)
    return separate / (LAYERS + sum(LAYERS - start - n for start, n, _ in blocks))


def shown(seconds: Mapping[str, float]) -> dict[str, float]:
    return {
        "separate_cpu_s": round(seconds["separate"], 2),
        "together_cpu_s": round(seconds["together"], 2),
        "ratio": round(seconds["separate"] / seconds["together"], 2),
    }


def missed(rows: Sequence[Mapping[str, Any]], target: float) -> list[str]:
    """A sentence for each case that is slower than the target, and need not be."""
    found = []
    for row in rows:
        figure = "runs" if "runs" in row else "scoring"
        ratio = row[figure]["ratio"]
        if row["layers_ratio"] >= target > ratio:
            found.append(
                f"Case '{row['case']}': {figure} together are {ratio} times as fast as separate "
                f"ones (target {target:g})."
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["bundled", "tiny", "15m", "110m"], default="bundled")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["deep", "chosen"])
    parser.add_argument("--questions", type=int, default=100, help="documents per task")
    parser.add_argument("--repeats", type=int, default=3, help="of the scoring")
    parser.add_argument("--target", type=float, default=TARGET, help="ratio to reach")
    parser.add_argument("--skip-runs", action="store_true", help="scoring only, no processes")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        dense = build_dense(arguments.model, scratch / "dense")
        if arguments.model == "bundled":
            from streamline_bench.core.machine.environment import resource as data

            task, tasks = "streamline_demo", Path(data("tasks")) / "lm_eval"
            limit = arguments.questions
        else:
            (scratch / "tasks").mkdir()
            task, tasks, limit = "", scratch / "tasks", None
            task = build_task(tasks, arguments.questions, 3996)
        for case in arguments.cases:
            checkpoints = {"dense": dense}
            for number, block in enumerate(CASES[case]):
                checkpoints[f"v{number}"] = build_variant(
                    dense, scratch / f"{case}{number}", *block
                )
            request = make_request(checkpoints, scratch / "out", task, tasks, limit)
            row: dict[str, Any] = {"model": arguments.model, "case": case}
            row["layers_ratio"] = round(ideal(case), 2)
            row["scoring"] = shown(scoring_alone(request, arguments.repeats))
            if not arguments.skip_runs:
                row["runs"] = shown(whole_runs(request, scratch))
            print(json.dumps(row), flush=True)
            rows.append(row)
    faults = missed(rows, arguments.target)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
