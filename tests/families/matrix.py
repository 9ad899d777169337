"""Which method works on which model type of transformers: makes ``reports/families.json``.

    python tests/families/matrix.py [--update] [--types llama,jamba] [--jobs 2] [--work FOLDER]

For every causal LM that the installed transformers knows, and for variants of some (tied weights,
windows, biases), a tiny random model is compressed by one recipe per method, and the result is
checked:

- it loads in its own class without a missing, unexpected or mismatched tensor, and has as many
  parameters as its manifest says;
- greedy tokens with a cache, and their logits, equal those without one (where the dense model's
  do: a few of transformers' own models compute something else with a cache);
- where a recipe only removes layers, its logits equal those of the dense model whose removed
  layers are bypassed in memory: each gives its input as its output. That does not depend on how a
  config is rewritten.

A recipe without a cell has no result on that type (``partly`` lists these columns).
A cell is ``exact`` (all three), ``runs`` (the first two), or says why it is neither: ``refused``
with the package's own sentence, ``wrong`` or ``crash``. Without ``--update`` the exit code is 1
where a cell is worse than in the committed file. Finished model types are kept in ``--work``.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

COMMITTED = ROOT / "reports" / "families.json"

REMOVE_ONLY = (
    "streamline_none", "last_layers", "shortgpt", "uidl", "sleb", "shortened_llama_taylor",
    "magnitude_l2", "tale",
)  # fmt: skip
AT_CUTS = "streamline_swiglu_res at two cuts"
RECIPES = (
    *REMOVE_ONLY, "laco", "sliding_merge", "streamline", "streamline_swiglu_res", AT_CUTS,
    "linear_patch", "replaceme_lstsq", "ridge_map", "prune_comp", "last_layers_lora",
    "last_layers_partial", "joint_drop", "attention_drop", "mlp_drop", "block_pruner", "llm_pruner",
    "flap", "minitron", "slicegpt", "reap",
)  # fmt: skip
"""One or a few for each method. The first eight only remove layers."""

BY_SHARE = (
    "joint_drop", "attention_drop", "mlp_drop", "block_pruner", "llm_pruner", "flap", "minitron",
    "slicegpt", "reap",
)  # fmt: skip
"""Asked for a share of the parameters; the others for two layers."""
ORDER = ("exact", "runs", "refused", "wrong", "crash")
"""From best to worst."""

SECONDS = 600
"""Longest time for one model type."""


def family_cells(model_type: str, recipes: Sequence[str]) -> dict[str, str]:
    """Return recipe -> cell of one model type."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            source = tiny_folder(model_type, Path(temporary) / "dense")
        except ImportError as error:
            packages = " and ".join(dict.fromkeys(_INSTALL.findall(str(error))))
            return dict.fromkeys(recipes, f"refused: it needs {packages}, not installed here")
        except Exception as error:
            return _without_model(model_type, Path(temporary) / "config", recipes, _line(error))

        @functools.cache
        def dense() -> tuple[Any, bool]:
            model = _load(source)[0]
            return model, not _cache_difference(model)

        return {name: _cell(source, dense, name) for name in recipes}


_INSTALL = re.compile(r"pip install `?([\w.-]+)")


def _without_model(
    model_type: str, folder: Path, recipes: Sequence[str], reason: str
) -> dict[str, str]:
    """Cells of a type that transformers cannot build: only a refusal of its config is sound."""
    from families.tiny_models import tiny_config

    from streamline_bench.core.architecture import architecture_of
    from streamline_bench.errors import ArchitectureError
    from streamline_bench.modeling.loading import load_config

    cell = f"crash: no tiny dense model ({reason})"
    try:
        tiny_config(model_type).save_pretrained(folder)
        architecture_of(load_config(folder))
    except ArchitectureError as error:
        if error.__cause__ is not None:  # transformers' own error
            return dict.fromkeys(recipes, cell)
        cell = f"refused: {_line(error)}".replace(str(folder), "MODEL")
    except Exception as error:
        cell = f"{cell}; nor its config ({_line(error)})"
    return dict.fromkeys(recipes, cell)


def tiny_folder(model_type: str, folder: Path, wider: int = 1) -> Path:
    """Save a tiny random model of six layers with a tokenizer and calibration text."""
    from conftest import make_word_tokenizer
    from families.tiny_models import tiny_model

    tiny_model(model_type, wider=wider).save_pretrained(folder)
    _save_tokenizer(make_word_tokenizer(), folder)
    lines = [" ".join(f"w{(i * 7 + j * 13) % 96}" for j in range(40)) for i in range(60)]
    text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (folder / "calibration.jsonl").write_text(text, encoding="utf-8")
    _save_questions(folder)
    return folder


def _save_questions(folder: Path) -> None:
    """Save a task of which a split is not scored."""
    words = [f"w{number}" for number in range(3, 90)]
    for split, first in (("validation", 0), ("test", 20)):
        rows = (
            {"context": " ".join(words[k : k + 5]), "choices": words[k + 5 : k + 8], "gold": k % 3}
            for k in range(first, first + 8)
        )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    task = {
        "task": "questions", "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {name: str(folder / f"{name}.jsonl") for name in ("validation", "test")}
        },
        "validation_split": "validation", "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / QUESTIONS).write_text(json.dumps(task), encoding="utf-8")


QUESTIONS = "questions.yaml"


def _save_tokenizer(words: Any, folder: Path) -> None:
    """Save a tokenizer of words, or of bytes where the class of the model type reads these only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words.save_pretrained(folder)
    if AutoTokenizer.from_pretrained(folder)("w1 w2")["input_ids"]:
        return
    special = sorted(words.all_special_tokens, key=words.convert_tokens_to_ids)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (not c.isascii(), c))
    known = [*special, "Ġ", *letters[: len(words) - len(special) - 1]]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(known)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    names = {key: str(value) for key, value in words.special_tokens_map.items()}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


def _cell(source: Path, dense: Callable[[], tuple[Any, bool]], name: str) -> str:
    """Compress a model by one recipe and check the result.

    Args:
        dense: returns the model of ``source``, and whether it computes the same with a cache.
    """
    from streamline_bench.errors import StreamlineBenchError

    output = source.parent / name
    try:
        _compress(source, name, output)
        model, cached = dense()
        return _checked(output, model, name, cached)
    except StreamlineBenchError as error:
        return f"refused: {_line(error)}".replace(str(source), "MODEL")
    except Exception as error:
        return f"crash: {type(error).__name__}: {_line(error)}".replace(str(source), "MODEL")
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _compress(source: Path, name: str, output: Path) -> None:
    from streamline_bench.compression import compress
    from streamline_bench.errors import SparsityError

    if name not in BY_SHARE:
        compress(source, _brief_recipe(name, source, n_layers=2), output, progress=False)
        return
    try:
        compress(source, _brief_recipe(name, source, sparsity=0.2), output, progress=False)
    except SparsityError as error:  # heads alone of a mixture are few parameters
        reached = re.search(r"(0\.\d+) to (0\.\d+)", str(error))
        if reached is None:
            raise
        most = float(reached[2])
        compress(source, _brief_recipe(name, source, sparsity=most), output, progress=False)


def _brief_recipe(name: str, source: Path, **size: float) -> Any:
    from streamline_bench.compression import load_recipe
    from streamline_bench.compression.recipes import applicable

    small: dict[str, Any] = {**size, "calibration": "auto", "sequence_length": 16}
    small["calibration.samples"] = 8
    if name == AT_CUTS:
        name, listed = "streamline_swiglu_res", {"layers": [1, 4]}
        small["parameters.selection"] = {"method": "given_layers", "parameters": listed}
    recipe = load_recipe(name)
    if "tasks" in recipe.parameters:
        small["parameters.tasks"] = str(source / QUESTIONS)
    for part in ("training", "recovery.training"):
        if part == "training" or recipe.recovery:
            small |= {f"{part}.min_steps": 2, f"{part}.epochs": 1, f"{part}.batch_size": 4}
            small |= {f"{part}.data.samples": 8, f"{part}.data.sequence_length": 16}
            small |= {f"{part}.warmup_steps": 0}
    return load_recipe(name, applicable(small, recipe))


def _checked(output: Path, dense: Any, name: str, cached: bool) -> str:
    import torch

    from streamline_bench.core.checkpoint.folder import read_manifest
    from streamline_bench.core.checkpoint.reader import CheckpointReader

    manifest, outer = read_manifest(output), CheckpointReader(output).num_outer
    assert manifest is not None
    model, report = _load(output)
    wrong = [f"{kind} {sorted(map(str, keys))[0]}" for kind, keys in report.items() if keys]
    if wrong:
        return f"wrong: loading reports {wrong[0]}"
    counted = sum(parameter.numel() for parameter in model.parameters()) - outer
    counted += _outer_buffers(model) if outer else 0
    if counted != manifest.parameters_after:
        return f"wrong: {counted} parameters, and the manifest says {manifest.parameters_after}"
    if cached and (difference := _cache_difference(model)):
        return f"wrong: with a cache, {difference}"
    if name not in REMOVE_ONLY:
        return "runs"
    ids = _ids()
    with torch.no_grad():
        found = model(ids, use_cache=False).logits
        with bypassed(dense, manifest.chosen["removed_layers"]):
            expected = dense(ids, use_cache=False).logits
    difference = float((found - expected).abs().max())
    return "exact" if difference == 0 else f"wrong: logits differ by {difference:.2g}"


def _outer_buffers(model: Any) -> int:
    """Elements that files hold of a multimodal model's towers and that are no parameters."""
    own, stored = {id(buffer) for buffer in model.get_decoder().buffers()}, model.state_dict()
    return sum(b.numel() for n, b in model.named_buffers() if n in stored and id(b) not in own)


@contextmanager
def bypassed(model: Any, removed: Sequence[int]) -> Iterator[None]:
    """Let layers of a causal LM hand on what they are given.

    They still run, so that their output has the form that the model expects. What layers hand on
    besides their states (of routers, say) is what the one before handed on.
    """
    from streamline_bench.core.architecture import decoder_layers
    from streamline_bench.errors import ArchitectureError

    handed: list[Any] = [()]

    def skip(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        if not isinstance(output, (tuple, list)):
            return states
        others = [*handed[-1], *[None] * len(output)][: len(output) - 1]
        return type(output)((states, *others))

    def keep(_: Any, args: tuple[Any, ...], output: Any) -> None:
        handed.append(output[1:] if isinstance(output, (tuple, list)) else ())

    try:
        layers = decoder_layers(model)
    except ArchitectureError:  # a multimodal model: those of its text model
        layers = model.get_decoder().layers
    hooks = [layers[i].register_forward_hook(skip, with_kwargs=True) for i in removed]
    kept = [layer for index, layer in enumerate(layers) if index not in removed]
    hooks += [layer.register_forward_hook(keep) for layer in kept]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _load(folder: Path) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    from streamline_bench.modeling import register

    register()
    named = json.loads((folder / "config.json").read_text("utf-8"))["architectures"][0]
    kind = getattr(transformers, named, transformers.AutoModelForCausalLM)
    model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model.generation_config.eos_token_id = None
    for parameter in model.parameters():
        # A mapped file puts weights anywhere, and where they lie decides how products are rounded.
        parameter.data = parameter.data.clone()
    return model.eval(), report


def _ids() -> Any:
    import torch

    return torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))


def _cache_difference(model: Any) -> str:
    """Say in what generation with a cache differs from that without; empty if in nothing."""
    import torch

    try:
        with_cache, without = (_greedy(model, use_cache=use) for use in (True, False))
    except Exception as error:
        return f"generation fails ({_line(error)})"
    if not torch.equal(with_cache.sequences, without.sequences):
        return "tokens differ"
    both = torch.stack(with_cache.logits), torch.stack(without.logits)
    difference = float((both[0] - both[1]).abs().max() / both[1].abs().max())
    return f"logits differ by {difference:.2g}" if difference > _ROUNDING else ""


_ROUNDING = 1e-3
"""Share of the largest logit: tokens alone are equal by chance now and then."""


def _greedy(model: Any, *, use_cache: bool) -> Any:
    ids = _ids()
    return model.generate(
        ids, attention_mask=ids.new_ones(ids.shape), do_sample=False, max_new_tokens=6,
        min_new_tokens=6, use_cache=use_cache, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip


def _line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:400]


def worse(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line for each cell of ``new`` that is worse than in ``old``."""
    found = []
    for model_type, cells in new.items():
        for recipe, cell in cells.items():
            before = old.get(model_type, {}).get(recipe)
            if before is not None and _rank(cell) > _rank(before):
                found.append(f"{model_type} {recipe}: {before.split(':')[0]} -> {cell}")
    return found


def _rank(cell: str) -> int:
    return ORDER.index(cell.partition(":")[0])


def _run(model_type: str, recipes: Sequence[str], target: Path) -> None:
    """Write the cells of a model type to a file (in a process of its own: some crash hard)."""
    with Path(os.devnull).open("w") as null, redirect_stdout(null), redirect_stderr(null):
        cells = family_cells(model_type, recipes)
    part = target.with_suffix(".part")
    part.write_text(json.dumps(cells), encoding="utf-8")
    part.rename(target)


def _warm(recipes: Sequence[str]) -> None:
    """Do here, once, what would otherwise be imported and compiled in each process of a type."""
    with Path(os.devnull).open("w") as null, redirect_stdout(null), redirect_stderr(null):
        family_cells("llama", recipes)
    gc.collect()
    gc.freeze()  # what the processes share is neither searched for garbage nor copied for that


def run_all(types: Sequence[str], recipes: Sequence[str], work: Path, jobs: int) -> dict[str, Any]:
    """Return model type -> cells; files in ``work`` are reused."""
    context, waiting, running = multiprocessing.get_context("fork"), list(types), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            model_type = waiting.pop(0)
            if not (work / f"{model_type}.json").exists():
                target = work / f"{model_type}.json"
                process = context.Process(target=_run, args=(model_type, recipes, target))
                process.start()
                running[model_type] = (process, time.monotonic())
        for model_type, (process, start) in list(running.items()):
            if process.is_alive() and time.monotonic() - start < SECONDS:
                continue
            reason = f"took over {SECONDS} s" if process.is_alive() else "the process ended"
            process.kill()
            process.join()
            del running[model_type]
            path = work / f"{model_type}.json"
            if not path.exists():
                path.write_text(json.dumps(dict.fromkeys(recipes, f"crash: {reason}")))
            counts = [cell.partition(":")[0] for cell in json.loads(path.read_text()).values()]
            shown = ", ".join(f"{counts.count(kind)} {kind}" for kind in ORDER if kind in counts)
            print(f"{model_type}: {shown} ({time.monotonic() - start:.0f} s)", flush=True)
        time.sleep(0.1)
    return {name: json.loads((work / f"{name}.json").read_text("utf-8")) for name in types}


def write(payload: Mapping[str, Any]) -> None:
    """Write the committed file, one line for each model type."""
    rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in payload["cells"].items())
    head = json.dumps({k: v for k, v in payload.items() if k != "cells"})[:-1]
    COMMITTED.write_text(f'{head}, "cells": {{\n{rows}\n}}}}\n', encoding="utf-8")


def main() -> int:
    """Make the matrix and compare it with the committed one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write reports/families.json")
    parser.add_argument("--types", help="model types, by commas; all unless given")
    parser.add_argument("--recipes", help="recipes, by commas; all of the matrix unless given")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, help="folder that keeps finished model types")
    asked = parser.parse_args()

    import transformers
    from families.tiny_models import CAUSAL_TYPES, VARIANTS

    types = asked.types.split(",") if asked.types else [*CAUSAL_TYPES, *VARIANTS]
    recipes = asked.recipes.split(",") if asked.recipes else list(RECIPES)
    work = asked.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    if not all((work / f"{name}.json").exists() for name in types):
        _warm(recipes)
    found = run_all(types, recipes, work, asked.jobs)
    known = json.loads(COMMITTED.read_text("utf-8")) if COMMITTED.exists() else {"cells": {}}
    lost = worse(known["cells"], found)
    print("\n".join(["", *(f"WORSE {line}" for line in lost)]))
    if asked.update:
        cells = {name: {**known["cells"].get(name, {}), **row} for name, row in found.items()}
        cells = {
            name: {recipe: row[recipe] for recipe in RECIPES if recipe in row}
            for name, row in sorted({**known["cells"], **cells}.items())
        }
        partly = [recipe for recipe in RECIPES if any(recipe not in row for row in cells.values())]
        write({**known, "transformers": transformers.__version__, "partly": partly, "cells": cells})
    return 0 if asked.update or not lost else 1


if __name__ == "__main__":
    sys.exit(main())
