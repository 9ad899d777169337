"""Serves models with vLLM, one after the other in this process, and writes their greedy tokens.

``python serve_models.py JOBS ANSWERS``; a process of its own, because serving changes classes of
transformers in place. Models of equal config and options share an engine, which is most of the
time: it reads the weights of each in turn.

JOBS: ``{"prompts": [[id, ...], ...], "tokens": count, "models": {key: options of LLM}}``.
ANSWERS: ``{key: {"served_by": class, "tokens": [[id, ...], ...], "caches": count}}``, or ``{key:
{"error": text}}``; ``caches`` is the number of attentions that keys and values are cached for.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def serve(
    folders: dict[str, str], options: dict[str, Any], prompts: list[list[int]], tokens: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key and answers of each model, and the class that gave them."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {
        "dtype": "float32",
        "kv_cache_memory_bytes": 16 * 2**20,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "enable_prefix_caching": False,
    }
    first, *_ = folders.values()
    engine = LLM(first, **{**settings, **options})
    (served_by,) = engine.llm_engine.model_config.architectures
    layers = engine.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    caches = sum(hasattr(layer, "get_kv_cache_spec") for layer in layers)
    for key, folder in folders.items():
        if folder != first:
            engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        outputs = engine.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        yield key, {"served_by": served_by, "tokens": answers, "caches": caches}
    del engine, layers
    gc.collect()
    cleanup_dist_env_and_memory()


def main() -> None:
    """Serve what the first argument names, write to the second."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    engines: dict[str, dict[str, str]] = {}
    for key, options in jobs["models"].items():
        folder = Path(options.pop("model"))
        config = json.loads((folder / "config.json").read_text())
        # vLLM gives other tokens after it read experts a second time.
        alone = key if any("expert" in name for name in config) else None
        engines.setdefault(json.dumps([config, options, alone]), {})[key] = str(folder)
    answers: dict[str, dict[str, Any]] = {}
    for described, folders in engines.items():
        try:
            for key, answer in serve(
                folders, json.loads(described)[1], jobs["prompts"], jobs["tokens"]
            ):
                answers[key] = answer
        except Exception as error:
            failure = {"error": f"{type(error).__name__}: {error}"}
            answers |= {key: failure for key in folders if key not in answers}
        Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
