"""Fixtures shared by all tests: offline hubs, tiny models, the optional folder of real data."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The harness bootstraps some errors in forks of the process that scores; forks of one with threads,
# as pytest-xdist's workers are, may hang.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="Renew tests/methods/golden.json, of recipes whose versions were raised.",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files of slow tests: the last minutes must not belong to one process."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """No test reads or writes the user's own compression cache."""
    monkeypatch.setenv("STREAMLINE_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def ended() -> Callable[..., bool]:
    """Return a function that waits until processes have ended; a zombie has."""
    import psutil

    def alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def wait(*pids: int, seconds: float = 20) -> bool:
        deadline = time.monotonic() + seconds
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return not any(map(alive, pids))

    return wait


@pytest.fixture(scope="session")
def forks() -> Iterator[Any]:
    """A context, ``with forks.used():``, in which processes are as with ``warm``."""
    import warm_python

    with warm_python.waiting() as popen:
        yield popen


@pytest.fixture
def warm(forks: Any) -> Iterator[Any]:
    """Processes of this package that a test starts are forks of one that has its imports done.

    For tests of what jobs do; those of what a process imports do without.
    """
    with forks.used():
        yield forks


@pytest.fixture(autouse=True)
def _own_log_level() -> Iterator[None]:
    """A command sets the level of our logger; the next test starts from the default again."""
    logger = logging.getLogger("streamline_bench")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def choice_task() -> Callable[[str, Path], str]:
    """Return a function: a task's name and its jsonl (question, choices, gold) -> its YAML."""

    def text(name: str, file: Path) -> str:
        return f"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""

    return text


@pytest.fixture(scope="session")
def words_choice(choice_task: Callable[[str, Path], str]) -> Callable[[Path, int], Path]:
    """Return a function that puts the task words_choice, of made-up questions, into a folder."""
    import json
    import random

    def write(folder: Path, count: int) -> Path:
        draw = random.Random(0)

        def words(number: int) -> str:
            return " ".join(f"w{draw.randrange(96)}" for _ in range(number))

        rows = [
            {"question": words(6), "choices": [words(1 + i % 4) for i in range(3)], "gold": 0}
            for _ in range(count)
        ]
        folder.mkdir(exist_ok=True)
        file = folder / "documents.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        (folder / "words_choice.yaml").write_text(choice_task("words_choice", file))
        return folder

    return write


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Real data and trained models, where present; else the test is skipped with the reason."""
    named = os.environ.get("STREAMLINE_BENCH_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"real data is not there: no folder {folder}/data (set STREAMLINE_BENCH_DATA)")
    return folder


def make_word_tokenizer() -> Any:
    """A word-level tokenizer over ``w0 .. w95`` with <pad>, <s>, </s>, <unk> (vocabulary 100)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(96))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """The tokenizer of :func:`make_word_tokenizer`."""
    return make_word_tokenizer()


@pytest.fixture(scope="session")
def make_tiny_model(
    tmp_path_factory: pytest.TempPathFactory, word_tokenizer: Any
) -> Callable[..., Path]:
    """Return a function that saves a tiny random causal LM and gives its folder.

    ``make_tiny_model("llama", num_hidden_layers=6, seed=1)``; other keywords go to the config.
    """

    def make(model_type: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes: dict[str, Any] = {
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        config = AutoConfig.for_model(model_type, **{**sizes, **changes})
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        folder = tmp_path_factory.mktemp(f"tiny-{model_type}")
        model.save_pretrained(folder)
        word_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_tiny_model: Callable[..., Path]) -> Path:
    """A six-layer random Llama (hidden 32, vocabulary 100) with its tokenizer. Do not modify."""
    return make_tiny_model("llama")


@pytest.fixture(scope="session")
def recipe_source(make_tiny_model: Callable[..., Path]) -> Path:
    """An eight-layer random Llama with calibration text in its folder. Do not modify.

    Its weights are drawn by numpy and by name, so that they are the same with every version of
    torch and transformers.
    """
    sizes = {"hidden_size": 128, "num_hidden_layers": 8, "intermediate_size": 96}
    return _with_drawn_weights(make_tiny_model("llama", **sizes))


@pytest.fixture(scope="session")
def mixture_source(make_tiny_model: Callable[..., Path]) -> Path:
    """A three-layer Mixtral of eight experts, otherwise like ``recipe_source``. Do not modify."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 64}
    return _with_drawn_weights(make_tiny_model("mixtral", num_local_experts=8, **sizes))


def _with_drawn_weights(folder: Path) -> Path:
    import json
    import zlib

    import numpy as np
    from safetensors.torch import load_file, save_file
    from torch import from_numpy

    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(weight.shape)
        # Wide weights: every mistake shows in the greedy tokens.
        values = 1 + 0.02 * drawn if weight.dim() == 1 else 0.15 * drawn
        weights[name] = from_numpy(values.astype(np.float32))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    lines = [" ".join(f"w{(i * 7 + j * 13) % 96}" for j in range(40)) for i in range(100)]
    text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (folder / "calibration.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def held_out_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML file of a task with choices: splits ``validation`` (24) and ``test`` (9 questions).

    The first four questions stand in both. Do not modify.
    """
    import json

    folder = tmp_path_factory.mktemp("choices")
    questions = [
        {
            "context": " ".join(f"w{(i * 11 + j * 17) % 96}" for j in range(3 + i % 5)),
            "choices": [f"w{(i * 7 + j * 29) % 96}" + " w3" * (j % 2) for j in range(3)],
            "gold": i % 3,
        }
        for i in range(29)
    ]
    for split, held in (("validation", questions[:24]), ("test", questions[:4] + questions[24:])):
        lines = "".join(json.dumps(question) + "\n" for question in held)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    path = folder / "tiny_choices.yaml"
    path.write_text(
        f"""
task: tiny_choices
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {folder}/validation.jsonl, test: {folder}/test.jsonl}}
validation_split: validation
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1}}
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def recipe_checkpoint(
    recipe_source: Path,
    mixture_source: Path,
    held_out_task: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Return a function: name in ``baselines/`` -> what it makes of ``recipe_source``.

    Recipes for mixtures alone get ``mixture_source``.

    Trainings are cut to a few steps, and run in one thread. Each is made once per session. Do not
    modify.
    """
    import torch

    made: dict[str, Path] = {"dense": recipe_source}

    def make(name: str) -> Path:
        from streamline_bench.compression import compress, load_recipe
        from streamline_bench.compression.recipes import applicable

        if name not in made:
            recipe = load_recipe(name)
            small: dict[str, Any] = {"calibration": "auto", "sequence_length": 16}
            if "tasks" in recipe.parameters:
                small["parameters.tasks"] = str(held_out_task)
            for part in ("training", "recovery.training"):
                if part == "training" or recipe.recovery:
                    small |= {f"{part}.min_steps": 2, f"{part}.epochs": 1}
                    small |= {f"{part}.data.samples": 16, f"{part}.data.sequence_length": 16}
                    small |= {f"{part}.batch_size": 8, f"{part}.warmup_steps": 0}
            output = tmp_path_factory.mktemp("recipes") / name
            recipe = load_recipe(name, applicable(small, recipe))
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                source = mixture_source if recipe.mixtures_only else recipe_source
                made[name] = compress(source, recipe, output, progress=False)
            finally:
                torch.set_num_threads(threads)
        return made[name]

    return make


@pytest.fixture(scope="session")
def lm_eval_outputs(
    make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, forks: Any
) -> Path:
    """A folder with ``dense/`` and ``pruned/``: two real outputs of the stock ``lm_eval``.

    Made by tests/stability/evaluate_toy.py, once for all processes of a session. Do not modify.
    """
    import shutil
    import subprocess
    import sys

    from filelock import FileLock

    one = "PYTEST_XDIST_WORKER" not in os.environ
    base = tmp_path_factory.getbasetemp() if one else tmp_path_factory.getbasetemp().parent
    work, script = base / "lm-eval-outputs", REPOSITORY / "tests" / "stability" / "evaluate_toy.py"
    with FileLock(base / "lm-eval-outputs.lock"):
        if not (work / "made").exists():
            model = base / "lm-eval-model"
            shutil.copytree(make_tiny_model("llama", num_hidden_layers=2), model)
            command = [sys.executable, str(script), str(model), str(work)]
            with forks.used():
                done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            (work / "made").touch()
    return work


@pytest.fixture(scope="session")
def opencompass_files() -> Any:
    """The module tests/opencompass_files.py: writes folders as OpenCompass does."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "opencompass_files", REPOSITORY / "tests" / "opencompass_files.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_CHOICE = """
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
_ENDING = """
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
_ROLLING = """
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
_GENERATION = """
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
_GROUP = """
group: trunk_group
task: [trunk_choice, trunk_ending]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 1.0}
"""


@pytest.fixture(scope="session")
def trunk_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``trunk_group`` (choice, ending), ``trunk_rolling``, ``trunk_generation``."""
    import json
    import random

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
    for text in (_CHOICE, _ENDING, _ROLLING, _GENERATION, _GROUP):
        name = text.split("\n")[1].split()[1]
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text of 2,000 known words in 100 documents."""
    lines = [" ".join(f"w{(i * 7 + j * 13) % 96}" for j in range(20)) for i in range(100)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_recipe(text_file: Path) -> Callable[..., Any]:
    """Return a function that loads a recipe, made small enough for a test."""

    def make(name: str = "streamline", **changes: Any) -> Any:
        from streamline_bench.compression import load_recipe
        from streamline_bench.compression.recipes import applicable

        small = {
            "calibration": str(text_file),
            "sequence_length": 16,
            "n_layers": 2,
            "training.min_steps": 6,
            "training.batch_size": 4,
        }
        if "sparsity" in changes:
            small.pop("n_layers")
        return load_recipe(name, {**applicable(small, load_recipe(name)), **changes})

    return make


@pytest.fixture(scope="session")
def make_throughput() -> Callable[..., dict[str, Any]]:
    """Return a function that makes a ``throughput.json`` of the rows of ``make_run``.

    ``make(dense=100, streamline=130, shortgpt=None)``: tokens per second, None for a failure.
    """

    def make(
        *,
        machine: str = "machine-1",
        device: str = "a processor",
        spread: float = 0.01,
        dtype: str = "float32",
        mode: str = "offline",
        engine_version: str = "5",
        threads: int = 1,
        workload: Mapping[str, Any] | None = None,
        load: Mapping[str, Any] | None = None,
        created: str = "2026-01-02T03:04:05+00:00",
        **rates: float | None,
    ) -> dict[str, Any]:
        rates = {"dense": 100.0, "streamline": 130.0, "shortgpt": 130.0, **rates}
        return {
            "created": created,
            "engine": "hf",
            "mode": mode,
            "dense": "dense",
            "dtype": dtype,
            "clock": "cpu",
            "confidence": 0.95,
            "interleaved": True,
            "workload": {"batch_sizes": [8], **(workload or {})},
            "serving_load": load,
            "environment": {
                "machine_id": machine,
                "device": "cpu",
                "device_name": device,
                "driver": None,
                "cpu_count": 2,
                "threads": threads,
                "engine_version": engine_version,
                "versions": {},
                "memory": "rss",
                "energy": "not read",
            },
            "models": [
                _speed_of(label, rate, rates["dense"], spread) for label, rate in rates.items()
            ],
        }

    return make


def _speed_of(label: str, rate: float | None, dense: float | None, spread: float) -> dict[str, Any]:
    point: dict[str, Any] = {"batch_requested": 8, "batch_size": 8, "status": "failed"}
    if rate is None:
        point["reason"] = "killed by signal 9"
    else:
        factors = (1 - spread, 1.0, 1 + spread)
        ends = {"low": rate * (1 - spread), "high": rate * (1 + spread)}
        point |= {"status": "ok", "output_tokens_per_second": {"median": rate, **ends}}
        point["rounds"] = [
            {"block": block, "index": 0, "seconds": 1.0, "cpu_seconds": 1000 / (rate * factor),
             "requests": 8, "prompt_tokens": 8, "output_tokens": 1000}
            for block, factor in enumerate(factors)
        ]  # fmt: skip
        if dense is not None:
            ratio = rate / dense
            ends = {"low": ratio * (1 - spread), "high": ratio * (1 + spread)}
            point["ratio"] = {"value": ratio, **ends, "blocks": 3}
    reason = None if rate is not None else point["reason"]
    return {
        "label": label,
        "model": label,
        "status": point["status"],
        "reason": reason,
        "points": [point],
    }
