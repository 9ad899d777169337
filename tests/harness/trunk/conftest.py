"""Variants of tiny models, and tasks of every kind to score them on."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

Variant = Callable[..., Path]

CHOICE = """
task: trunk_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: choices
doc_to_target: gold
num_fewshot: 1
fewshot_split: test
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
"""
ENDING = """
task: trunk_ending
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{query}}"
doc_to_target: " {{choices[0]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
metadata: {version: 1.0}
"""
ROLLING = """
task: trunk_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
metadata: {version: 1.0}
"""
GENERATION = """
task: trunk_generation
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["</s>"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
metadata: {version: 1.0}
"""
GROUP = """
group: trunk_group
task: [trunk_choice, trunk_ending]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 1.0}
"""


@pytest.fixture(scope="session")
def trunk_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``trunk_group`` (choice, ending), ``trunk_rolling``, ``trunk_generation``."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(96)}" for _ in range(count))

    rows = [
        {
            "query": words(4 + i % 9),
            "choices": [words(1 + (i + j) % 5) for j in range(3)],
            "gold": i % 3,
            "text": words(20 + 40 * (i % 5)),
        }
        for i in range(9)
    ]
    (folder / "choice.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for text in (CHOICE, ENDING, ROLLING, GENERATION, GROUP):
        name = text.split("\n")[1].split()[1]
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="session")
def make_variant(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """Return a function that saves a model with some layers kept, or changed.

    ``make_variant(dense, [0, 1, 4, 5], attach=(1, "swiglu_res"))`` keeps four layers and puts a
    random network behind the second; ``edit`` is called with the model before it is saved.
    """

    def make(
        dense: Path,
        keep: Sequence[int],
        *,
        attach: tuple[int, str] | None = None,
        edit: Callable[[Any], None] | None = None,
        seed: int = 7,
        **saving: Any,
    ) -> Path:
        import torch
        from transformers import AutoModelForCausalLM

        from streamline_bench.core.surgery import keep_layers
        from streamline_bench.modeling import Attachment, StreamlineForCausalLM, streamline_config

        model = AutoModelForCausalLM.from_pretrained(dense)
        keep_layers(model, list(keep))
        if attach is not None:
            torch.manual_seed(seed)
            after, kind = attach
            config = streamline_config(model.config, [Attachment(after, kind, 32)])
            hosted = StreamlineForCausalLM.from_config(config)
            hosted.load_state_dict(model.state_dict(), strict=False)
            model = hosted
        if edit is not None:
            with torch.no_grad():
                edit(model)
        folder = tmp_path_factory.mktemp("variant")
        model.save_pretrained(folder, **saving)
        for path in [*dense.glob("tokenizer*"), *dense.glob("special_tokens*")]:
            shutil.copy(path, folder)
        return folder

    return make
