"""Makes real lm-eval outputs: two tiny models, the stock ``lm_eval`` command line, toy tasks.

``python evaluate_toy.py MODEL WORK`` writes ``WORK/dense`` and ``WORK/pruned`` (lm-eval output
folders, with samples), where "pruned" is the model with noise added to its weights; and of tasks
whose metrics are of every kind, ``WORK/graded/dense`` and ``WORK/graded/pruned``.
"""

from __future__ import annotations

import json
import random
import sys
from functools import partial
from pathlib import Path

TASKS = "toy_group,toy_fill,toy_ll,toy_roll"
GRADED_TASKS = "graded_group,graded_ifeval,graded_repeats,graded_code,graded_roll,graded_choice"

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

SCORED = """
task: graded_NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/long.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["</s>"], max_gen_toks: 6}
process_results: !function graded_metrics.NAME
"""
SQUAD = (
    SCORED.replace("NAME", "squad")
    + """
metric_list:
  - {metric: exact, aggregation: mean, higher_is_better: true}
  - {metric: f1, aggregation: mean, higher_is_better: true}
"""
)
SUMMARY = (
    SCORED.replace("NAME", "summary")
    + """
metric_list:
  - {metric: length, aggregation: mean, higher_is_better: false}
  - {metric: rouge1, aggregation: mean, higher_is_better: true}
  - {metric: rougeL, aggregation: mean, higher_is_better: true}
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
"""
)
IFEVAL = (
    SCORED.replace("NAME", "ifeval")
    + """
metric_list:
  - {metric: inst_level_strict_acc, aggregation: !function graded_metrics.over_all,
     higher_is_better: true}
  - {metric: prompt_level_strict_acc, aggregation: mean, higher_is_better: true}
"""
)
REPEATS = """
task: graded_repeats
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/long.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["</s>"], max_gen_toks: 2, do_sample: true, temperature: 1.0}
repeats: 2
filter_list:
  - {name: first, filter: [{function: take_first}]}
  - {name: maj@2, filter: [{function: majority_vote}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CODE = """
task: graded_code
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/long.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["</s>"], max_gen_toks: 6, do_sample: true, temperature: 1.0}
repeats: 2
filter_list: [{name: every, filter: [{function: take_first_k, k: 2}]}]
metric_list: [{metric: !function graded_metrics.pass_at_k, aggregation: mean,
               higher_is_better: true, k: [1, 2]}]
"""
CHOICE = """
task: graded_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/mc.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: brier_score}, {metric: acc}]
"""
GRADED_ROLL = ROLLING.replace("toy_roll", "graded_roll").replace(
    "{metric: word_perplexity}", "{metric: word_perplexity}, {metric: bits_per_byte}"
)
GRADED_GROUP = """
group: graded_group
task:
  - graded_squad
  - group: graded_texts
    task: [graded_summary]
"""
METRICS = """
from collections import Counter


def overlap(answer, right):
    answer, right = answer.split(), right.split()
    shared = sum((Counter(answer) & Counter(right)).values())
    return 2 * shared / (len(answer) + len(right)) if shared else 0.0


def squad(doc, results):
    return {"exact": int(results[0].strip() == doc["a"]), "f1": overlap(results[0], doc["a"])}


def summary(doc, results):
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rouge1", "rougeL"]).score(doc["a"], results[0])
    found = {name: 100 * score.fmeasure for name, score in scores.items()}
    return found | {"chrf": [doc["a"], results[0]], "length": 1.0 + len(results[0].split())}


def ifeval(doc, results):
    words = results[0].split()
    followed = [len(words) > 3, "w1" in results[0], len(set(words)) == len(words)][: doc["rules"]]
    return {"prompt_level_strict_acc": all(followed), "inst_level_strict_acc": followed}


def over_all(items):
    flat = [each for item in items for each in item]
    return sum(flat) / len(flat)


def pass_at_k(references, predictions, k):
    right = sum(overlap(each, references[0]) > 0 for each in predictions[0])
    n = len(predictions[0])
    return {f"pass@{size}": 1.0 if n - right < size else right / n for size in k}
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
    # Answers repeat words of the question, so that a tiny model has some of them right.
    long = [{"q": (q := words(6)), "a": " ".join(q.split()[3:]), "rules": 1 + number % 3}
            for number in range(30)]  # fmt: skip
    (folder / "graded_metrics.py").write_text(METRICS)
    for name, rows in (("mc", mc), ("fill", fill), ("gen", gen), ("long", long)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    graded = (SQUAD, SUMMARY, IFEVAL, REPEATS, CODE, CHOICE, GRADED_ROLL, GRADED_GROUP)
    for text in (MULTIPLE_CHOICE, FILL, GENERATION, LIKELIHOOD, ROLLING, GROUP, *graded):
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


def evaluate_graded(model: Path, tasks: Path, output: Path) -> None:
    """As ``lm_eval`` does, without its minute for the tasks of others and the environment."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    tracker = EvaluationTracker(output_path=str(output))
    found = simple_evaluate(
        model="hf", model_args=f"pretrained={model}", tasks=GRADED_TASKS.split(","), device="cpu",
        batch_size=8, log_samples=True, evaluation_tracker=tracker, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )  # fmt: skip
    samples = found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=samples)
    for name in found["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])


def main(model: Path, work: Path) -> None:
    import lm_eval.tasks
    from lm_eval.__main__ import cli_evaluate

    # The index of its own thousands of tasks takes seconds.
    lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    write_tasks(work / "tasks")
    add_noise(model, work / "noisy")
    for name, folder in (("dense", model), ("pruned", work / "noisy")):
        sys.argv = [
            *("lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}"),
            *("--tasks", TASKS, "--include_path", str(work / "tasks"), "--device", "cpu"),
            *("--batch_size", "8", "--log_samples", "--output_path", str(work / name)),
        ]
        cli_evaluate()
        evaluate_graded(folder, work / "tasks", work / "graded" / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
