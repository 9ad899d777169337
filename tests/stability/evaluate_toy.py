"""Makes real lm-eval outputs: two tiny models, the stock ``lm_eval`` command line, toy tasks.

``python evaluate_toy.py MODEL WORK`` writes ``WORK/dense`` and ``WORK/pruned`` (lm-eval output
folders, with samples), where "pruned" is the model with noise added to its weights.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

TASKS = "toy_group,toy_fill,toy_ll,toy_roll"

MULTIPLE_CHOICE = """
task: toy_mc
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/mc.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
"""
FILL = """
task: toy_fill
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/fill.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: label
doc_to_choice: contexts
doc_to_target: "{{ending}}"
metric_list: [{metric: acc}]
metadata: {version: 1.0}
"""
GENERATION = """
task: toy_gen
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/gen.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["</s>"], max_gen_toks: 4}
filter_list:
  - {name: strict, filter: [{function: take_first}]}
  - {name: first, filter: [{function: regex, regex_pattern: "(w[0-9]+)"}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 0.0}
"""
LIKELIHOOD = """
task: toy_ll
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/gen.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{q}}"
doc_to_target: " {{a}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
ROLLING = """
task: toy_roll
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/gen.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: word_perplexity}]
"""
GROUP = """
group: toy_group
task: [toy_mc, toy_gen]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


def write_tasks(folder: Path) -> None:
    folder.mkdir(parents=True)
    source = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{source.randrange(96)}" for _ in range(count))

    mc = [
        {"q": words(5), "choices": [words(k) for k in (2, 2, 2, 2)], "label": source.randrange(4)}
        for _ in range(40)
    ]
    fill = []
    for _ in range(8):
        start = words(3)
        fill.append(
            {"contexts": [f"{start} {words(1)}", f"{start} {words(1)}"], "ending": words(2),
             "label": source.randrange(2)}
        )  # fmt: skip
    gen = [{"q": words(5), "a": words(1)} for _ in range(5)]
    for name, rows in (("mc", mc), ("fill", fill), ("gen", gen)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for text in (MULTIPLE_CHOICE, FILL, GENERATION, LIKELIHOOD, ROLLING, GROUP):
        name = text.split()[1]
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))


def add_noise(model: Path, output: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(7)
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for weight in changed.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.5 * float(weight.std(correction=0)))
    changed.save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)


def main(model: Path, work: Path) -> None:
    from lm_eval.__main__ import cli_evaluate

    write_tasks(work / "tasks")
    add_noise(model, work / "noisy")
    for name, folder in (("dense", model), ("pruned", work / "noisy")):
        sys.argv = [
            *("lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}"),
            *("--tasks", TASKS, "--include_path", str(work / "tasks"), "--device", "cpu"),
            *("--batch_size", "8", "--log_samples", "--output_path", str(work / name)),
        ]
        cli_evaluate()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
