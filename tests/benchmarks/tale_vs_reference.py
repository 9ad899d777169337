"""TALE beside its authors' code: same model, same questions.

    git clone https://github.com/omyokun/tale REFERENCE
    python tests/benchmarks/tale_vs_reference.py --reference REFERENCE \
        --model streamline_bench/demo/model --questions tasks/lm_eval/bundled/data/story.jsonl

The first half of the questions is searched, the other half is the split that is scored. Their
search and their pass without layers are run unchanged, in float32; of them nothing is kept here.
What a model answers is the likeliest choice on both sides: their one generated letter after a chat
prompt is replaced. Reported, for every layer removed: the layer and the accuracy. Exit code 1 when
they differ.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoTokenizer

from streamline_bench.compression import compress, load_recipe
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.methods.depth.tale import encoded_pair

TASK = """
task: questions
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {0}/validation.jsonl, test: {0}/test.jsonl}}}}
validation_split: validation
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
LETTERS = "ABCD"


def theirs(
    checkout: Path, model: Path, questions: list[dict[str, Any]], n: int, output: Path
) -> list[dict[str, Any]]:
    """Remove n layers as their search does; return what it writes after each step."""
    sys.path.insert(0, str(checkout / "src"))
    search: Any = importlib.import_module("tale.search")
    tokenizer = AutoTokenizer.from_pretrained(model)
    records = [{**each, "target": LETTERS[each["gold"]]} for each in questions]

    def likeliest(model_instance: Any, input_ids: Any, **_: Any) -> str:
        scores = []
        for choice in input_ids["choices"]:
            context, answer = encoded_pair(tokenizer, input_ids["context"], f" {choice}")
            with torch.no_grad():
                logits = model_instance(torch.tensor([context + answer]))["logits"][0]
            of_tokens = logits.log_softmax(-1)[len(context) - 1 : -1]
            scores.append(float(of_tokens.gather(1, torch.tensor(answer)[:, None]).sum()))
        return LETTERS[scores.index(max(scores))]

    search.load_task_dataset = lambda *_: records
    search.build_chat_prompt = lambda _, record: record
    search.tokenize_chat = lambda _, record, __: record
    search.generate_text = likeliest
    search.run_search(
        argparse.Namespace(
            model=str(model), task="arc_easy", data_path="", output_dir=str(output), device="cpu",
            torch_dtype="float32", num_samples=None, trust_remote_code=False, epsilon=1.0,
            max_new_tokens=1, max_drop_layers=n, initial_drop_layers_0idx="",
        )
    )  # fmt: skip
    steps: list[dict[str, Any]] = json.loads((output / "accepted_configs.json").read_text())
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a folder, Llama architecture")
    parser.add_argument("--questions", type=Path, required=True, help="context, choices, gold")
    parser.add_argument("--documents", type=int, default=50, help="how many are searched")
    parser.add_argument("--layers", type=int, default=4, help="how many are removed")
    asked = parser.parse_args()
    lines = asked.questions.read_text(encoding="utf-8").splitlines()[: 2 * asked.documents]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        halves = {"validation": lines[: asked.documents], "test": lines[asked.documents :]}
        for split, held in halves.items():
            (folder / f"{split}.jsonl").write_text("\n".join(held) + "\n", encoding="utf-8")
        (folder / "questions.yaml").write_text(TASK.format(folder), encoding="utf-8")
        changes = {"n_layers": asked.layers, "parameters.tasks": str(folder / "questions.yaml")}
        recipe = load_recipe("tale", {**changes, "parameters.documents": asked.documents})
        out = compress(asked.model, recipe, folder / "out", cache=folder / "cache", progress=False)
        manifest = read_manifest(out)
        assert manifest is not None
        chosen = manifest.chosen
        shared = chosen["tasks"]["questions"]["shared"]
        scored = set(halves["test"])
        searched = [json.loads(line) for line in halves["validation"] if line not in scored]
        steps = theirs(asked.reference, asked.model, searched, asked.layers, folder / "theirs")
    ours = list(
        zip([None, *chosen["order"]], [chosen["accuracy_dense"], *chosen["accuracy_after_step"]],
            strict=True)
    )  # fmt: skip
    other = [(step["accepted_layer_0idx"], step["accuracy"]) for step in steps]
    print(f"{len(searched)} questions searched, {shared} left out as scored ones\n")
    print("| step | layer, ours | reference | accuracy, ours | reference |\n|---|---|---|---|---|")
    for step, (one, two) in enumerate(zip(ours, other, strict=True)):
        print(f"| {step} | {one[0]} | {two[0]} | {one[1]:.4f} | {two[1]:.4f} |")
    same = all(
        one[0] == two[0] and abs(one[1] - two[1]) < 1e-9
        for one, two in zip(ours, other, strict=True)
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
