"""What is fuzzed: for each kind of file a small valid folder, and the function that reads it.

A reader may answer or raise a StreamlineBenchError; anything else is a finding.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import opencompass_files

REPOSITORY = Path(__file__).resolve().parent.parent.parent
Files = dict[str, bytes]


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        seeds: valid folders, relative path -> content.
        read: reads such a folder.
    """

    seeds: tuple[Mapping[str, bytes], ...]
    read: Callable[[Path], object]


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# lm-eval


def _line(document: int, answers: list[Any], metric: str, **fields: Any) -> dict[str, Any]:
    prompt = f"Question {document}?"
    return {
        "doc_id": document, "doc": {"q": prompt, "passage": "p"}, "target": str(document % 2),
        "resps": [answers], "filtered_resps": answers, "filter": "none", "metrics": [metric],
        "doc_hash": _digest(prompt), "prompt_hash": _digest(prompt), "target_hash": _digest("t"),
        metric: float(document % 2), **fields,
    }  # fmt: skip


def _choices(document: int) -> dict[str, Any]:
    arguments = {f"gen_args_{k}": {"arg_0": f"Question {document}?", "arg_1": f" choice {k}"}
                 for k in range(3)}  # fmt: skip
    scores = [[str(Random(document * 9 + k).gauss(-20, 2)), "False"] for k in range(3)]
    return _line(document, scores, "acc", arguments=arguments, acc_norm=1.0)


def _generated(document: int, filter_name: str) -> dict[str, Any]:
    arguments = {"gen_args_0": {"arg_0": "Say", "arg_1": {"until": ["\n"]}}}
    return _line(
        document, [f"word {document}"], "exact_match", arguments=arguments, filter=filter_name
    )


def lm_eval_folder(time: str = "2025-05-01T10-00-00.000001", version: str = "0.4.13") -> Files:
    """One evaluation of three tasks: choices, generations by two filters, a perplexity."""
    rolling = {"gen_args_0": {"arg_0": "a whole text"}}
    lines = {
        "boolq": [_choices(number) for number in range(4)],
        "gsm8k": [_generated(n, name) for name in ("strict", "flexible") for n in range(3)],
        "wikitext": [_line(n, [["-9.5", "False"]], "word_perplexity", arguments=rolling,
                           word_perplexity=[-9.5, 3]) for n in range(2)],
    }  # fmt: skip
    kinds = {
        "boolq": "multiple_choice",
        "gsm8k": "generate_until",
        "wikitext": "loglikelihood_rolling",
    }
    results = {
        "results": {name: {"alias": name, "acc,none": 0.5} for name in lines},
        "group_subtasks": {"all": ["boolq", "gsm8k"], "wikitext": []},
        "configs": {
            name: {
                "task": name, "output_type": kind, "target_delimiter": " ",
                "metric_list": [{"metric": "acc"}],
                "filter_list": [{"name": "strict"}, {"name": "flexible"}],
            }
            for name, kind in kinds.items()
        },
        "versions": dict.fromkeys(lines, 1.0), "n-shot": dict.fromkeys(lines, 0),
        "higher_is_better": {"boolq": {"acc": True}},
        "n-samples": {name: {"original": len(rows), "effective": len({r["doc_id"] for r in rows})}
                      for name, rows in lines.items()},
        "config": {"model": "hf", "model_args": "pretrained=x", "limit": None, "random_seed": 0},
        "task_hashes": {
            name: _digest("".join(r["doc_hash"] + r["prompt_hash"] + r["target_hash"]
                                  for r in rows))
            for name, rows in lines.items() if name != "boolq"
        },
        "model_name": "x", "lm_eval_version": version, "transformers_version": "5",
        "chat_template": None, "system_instruction": None, "fewshot_as_multiturn": False,
        "total_evaluation_time_seconds": "3.2",
    }  # fmt: skip
    files = {f"x/results_{time}.json": _dumped(results)}
    for name, rows in lines.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        files[f"x/samples_{name}_{time}.jsonl"] = text.encode()
    return files


def _read_samples(folder: Path) -> object:
    """Read, compare with itself and store: what reading let pass must not break what follows."""
    from streamline_bench.stability.compare_answers import compare_answers
    from streamline_bench.stability.readers.load import load_samples
    from streamline_bench.stability.settings import Settings

    samples = load_samples(folder, progress=False)
    samples.save(folder / "samples.parquet")
    return compare_answers(
        samples, load_samples(folder / "samples.parquet"), settings=Settings(draws=10)
    )


# OpenCompass


def opencompass_folder(time: str = "20260101_120000") -> Files:
    """One run: two data sets in parts with their evaluations, one of choices by probability."""
    numbered = lambda entries: _dumped(dict(zip(map(str, range(99)), entries, strict=False)))  # noqa: E731
    details = [{"example_abbr": f"qa_{n}", "correct": [n % 2 == 0]} for n in range(4)]
    answers = opencompass_files.gen(4, seed=1, golds=["A"] * 4)
    listed = {"0": {"origin_prediction": answers[0]["prediction"], "correct": True}, "type": "GEN"}
    model, results = f"{time}/predictions/m", f"{time}/results/m"
    return {
        f"{model}/arc.json": numbered(opencompass_files.ppl(3, seed=1)),
        f"{model}/clp.json": numbered(opencompass_files.clp(2, seed=1)),
        f"{model}/qa_0.json": numbered(answers[:2]),
        f"{model}/qa_1.json": numbered(answers[2:]),
        f"{model}/one.json": numbered(answers[:1]),
        f"{results}/arc.json": _dumped({"accuracy": 100 / 3}),
        f"{results}/qa_0.json": _dumped({"accuracy": 50.0, "details": details[:2]}),
        f"{results}/qa_1.json": _dumped({"accuracy": 50.0, "details": details[2:]}),
        f"{results}/one.json": _dumped({"accuracy": 100.0, "details": listed}),
        f"{time}/configs/{time}_1.py": (
            b"datasets = [dict(abbr='arc', n=1), dict(abbr='qa'), [dict(abbr='clp')]]\n"
            b"models = [dict(abbr='m', path='some/model', batch_size=4, run_cfg=dict(num_gpus=1))]"
        ),
    }


# models


def model_folder() -> Files:
    """A config and safetensors in two shards."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4,
        "intermediate_size": 4, "num_hidden_layers": 2, "num_attention_heads": 1,
        "num_key_value_heads": 1, "vocab_size": 3, "tie_word_embeddings": False, "head_dim": 4,
        "max_position_embeddings": 64, "rope_scaling": None, "layer_types": ["full_attention"] * 2,
        "torch_dtype": "float32", "rope_theta": 10000.0,
    }  # fmt: skip
    shapes = {
        "model.embed_tokens.weight": [3, 4], "model.layers.0.mlp.up_proj.weight": [4, 4],
        "model.layers.1.mlp.up_proj.weight": [4, 4], "model.norm.weight": [4],
        "lm_head.weight": [3, 4],
    }  # fmt: skip
    shards: dict[str, dict[str, list[int]]] = {"a.safetensors": {}, "b.safetensors": {}}
    for number, (name, shape) in enumerate(shapes.items()):
        shards[("a.safetensors", "b.safetensors")[number % 2]][name] = shape
    index = {"metadata": {"total_size": 1}, "weight_map": {
        name: shard for shard, names in shards.items() for name in names}}  # fmt: skip
    files = {"config.json": _dumped(config), "model.safetensors.index.json": _dumped(index)}
    return files | {name: tensor_file(tensors) for name, tensors in shards.items()}


def tensor_file(shapes: Mapping[str, list[int]]) -> bytes:
    """A safetensors file of float32 zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = _dumped(header)
    return struct.pack("<Q", len(text)) + text + bytes(end)


def _read_tensors(folder: Path) -> object:
    from streamline_bench.core.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(folder)
    return reader.num_parameters, [reader.tensor(name) for name in reader.names]


def _read_config(folder: Path) -> object:
    from streamline_bench.core.architecture import require_removable_layers
    from streamline_bench.core.checkpoint.folder import resolve_pretrained
    from streamline_bench.core.checkpoint.reader import CheckpointReader
    from streamline_bench.core.surgery import model_sizes

    reader = CheckpointReader(resolve_pretrained(folder))
    require_removable_layers(reader.config)
    return model_sizes(reader), reader.num_parameters


# text for calibration


def _read_calibration(folder: Path) -> object:
    from streamline_bench.core.data.calibration import load_calibration
    from streamline_bench.core.recipe.schema import CalibrationSpec

    found = next(path for path in sorted(folder.iterdir()))
    spec = CalibrationSpec(source=str(found), samples=2, sequence_length=4)
    return load_calibration(spec, _tokenizer(), progress=False)


_TOKENIZERS: list[Any] = []


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if not _TOKENIZERS:
        words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "a": 4, "b": 5}
        inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        _TOKENIZERS.append(
            PreTrainedTokenizerFast(
                tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
            )
        )
    return _TOKENIZERS[0]


# what users write, and what we write


def _read_yaml(folder: Path) -> object:
    from streamline_bench.compression.recipes import load_recipe
    from streamline_bench.runs.planning.request import make_request, read_request

    for file in sorted(folder.iterdir()):
        if file.name == "plan.yaml":
            make_request(read_request(str(file)), str(file))
        else:
            load_recipe(file)
    return None


def _read_records(folder: Path) -> object:
    from streamline_bench.core.checkpoint.folder import read_manifest
    from streamline_bench.gate.evidence import read_evidence
    from streamline_bench.report.run_file import read_run_file
    from streamline_bench.throughput.speed import read_figures

    if (folder / "reference.json").exists():
        read_evidence(folder / "reference.json", progress=False)
    if (folder / "leaderboard.json").exists():
        read_evidence(folder / "leaderboard.json", progress=False)
    if (folder / "throughput.json").exists():
        read_figures(folder)
    if (folder / "run.json").exists():
        read_run_file(folder)
    return read_manifest(folder)


def record_folder() -> Files:
    """Gate reference, throughput record and manifest (leaderboard and run: see below)."""
    number = {"value": 0.5, "standard_error": 0.1, "low": 0.3, "high": 0.7, "method": "m"}
    task = {"task": "a", "filter": "none", "n": 9, "accuracy": number, "stability": number,
            "documents": "ab", "right": "ff80"}  # fmt: skip
    speed = {"status": "ok", "engine": "hf", "device": "cpu", "dtype": "float32", "batch_size": 1,
             "ratio": 1.1, "clock": "wall"}  # fmt: skip
    reference = {
        "kind": "streamline-bench gate reference", "schema_version": 1, "source": "s", "title": "t",
        "dense": "dense", "method": {"mode": "paper", "ddof": 1, "quantity": "nll",
        "verdict": "correct", "confidence": 0.95, "draws": 10, "seed": 0},
        "rows": [{"label": "dense", "is_dense": True, "tasks": [task], "speed": speed}],
    }  # fmt: skip
    rate = {"median": 10.0, "low": 9.0, "high": 11.0}
    round_ = {"index": 0, "seconds": 1.0, "cpu_seconds": 1.0, "requests": 1, "prompt_tokens": 2,
              "output_tokens": 2}  # fmt: skip
    point = {
        "batch_requested": 1, "batch_size": 1, "status": "ok", "rounds": [round_],
        "output_tokens_per_second": rate, "ratio": {"value": 1.0, "low": 0.9, "high": 1.1},
    }  # fmt: skip
    throughput = {
        "schema_version": 1, "created": "2026-01-01", "engine": "hf", "mode": "offline",
        "dense": "dense", "dtype": "float32", "clock": "wall", "confidence": 0.95,
        "interleaved": True, "workload": {"batch_sizes": [1]},
        "environment": {"machine_id": "m", "device": "cpu", "device_name": "c", "driver": None,
                        "cpu_count": 2, "threads": 1, "engine_version": "1", "versions": {},
                        "load_average": [0.1, 0.2], "memory": "rss", "energy": "none"},
        "models": [{"label": "dense", "model": "x", "status": "ok", "points": [point]}],
    }  # fmt: skip
    manifest = {
        "schema_version": 1, "source": {"name": "x", "weights_sha256": "ab"},
        "recipe": {"name": "r"},
        "parameters_before": 9, "parameters_after": 8, "layers_before": 3, "layers_after": 2,
        "sparsity_reached": 0.1,
    }  # fmt: skip
    run = {"schema_version": 1, "dense": "dense", "rows": [{"label": "dense", "failed": "why"}]}
    return {
        "reference.json": _dumped(reference),
        "throughput.json": _dumped(throughput),
        "streamline.json": _dumped(manifest),
        "run.json": _dumped(run),
    }


def _yaml_files() -> tuple[Files, ...]:
    plan = b"""
model: bundled
recipes: [dense, streamline, {recipe: shortgpt, label: short, set: {sparsity: 0.5}}]
tasks: [piqa]
set: {sparsity: 0.25, training.lr: 1.0e-4}
limit: 10
throughput: none
environment: {A: b}
"""
    baselines = REPOSITORY / "baselines"
    names = ("streamline", "slicegpt_lora", "llm_pruner", "streamline_paper")
    return (
        {"plan.yaml": plan},
        *({f"{name}.yaml": (baselines / f"{name}.yaml").read_bytes()} for name in names),
    )


def _calibration_files() -> tuple[Files, ...]:
    lines = b'{"text": "a b a b a b", "meta": {"name": "x"}}\n' * 8
    return (
        {"text.jsonl": lines},
        {"text.txt": b"a b a b\n\nb a b a b\n\n" * 8},
    )


TARGETS: dict[str, Target] = {
    "lm_eval": Target((lm_eval_folder(),), _read_samples),
    "opencompass": Target((opencompass_folder(),), _read_samples),
    "tensors": Target((model_folder(),), _read_tensors),
    "config": Target((model_folder(),), _read_config),
    "calibration": Target(_calibration_files(), _read_calibration),
    "yaml": Target(_yaml_files(), _read_yaml),
    "records": Target((record_folder(),), _read_records),
}
