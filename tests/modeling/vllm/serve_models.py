"""Serves models with vLLM, one after the other in this process, and writes their greedy tokens.

``python serve_models.py JOBS ANSWERS``; a process of its own, because serving changes classes of
transformers in place.

JOBS: ``{"prompts": [[id, ...], ...], "tokens": count, "models": {key: options of LLM}}``.
ANSWERS: ``{key: {"served_by": class, "tokens": [[id, ...], ...], "caches": count}}``, or ``{key:
{"error": text}}``; ``caches`` is the number of attentions that keys and values are cached for.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def serve(options: dict[str, Any], prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Return the answers of one model and the class that gave them."""
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
    engine = LLM(**{**settings, **options})
    outputs = engine.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    (served_by,) = engine.llm_engine.model_config.architectures
    layers = engine.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    answer = {
        "served_by": served_by,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "caches": sum(hasattr(layer, "get_kv_cache_spec") for layer in layers),
    }
    del engine, layers
    gc.collect()
    cleanup_dist_env_and_memory()
    return answer


def main() -> None:
    """Serve what the first argument names, write to the second."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    answers = {}
    for key, options in jobs["models"].items():
        try:
            answers[key] = serve(options, jobs["prompts"], jobs["tokens"])
        except Exception as error:
            answers[key] = {"error": f"{type(error).__name__}: {error}"}
        Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
