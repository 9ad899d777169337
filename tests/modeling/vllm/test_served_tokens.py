"""vLLM answers as transformers does, token by token, whatever a checkpoint is made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# The first test waits for some fifty engines.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(3600)]

PROMPTS = [[(7 * i + 11 * n) % 97 + 3 for i in range(n)] for n in (1, 7, 19, 33)]
TOKENS = 10

HOSTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 128, "num_key_value_heads": 4},
}
"""Host families, with features that serving must survive."""

FURTHER_HOSTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 16, "head_dim": 32},
    "glm4": {"head_dim": 32},
    **{name: {} for name in ("granite", "olmo2", "phi", "phi3", "smollm3", "stablelm")},
}
"""Host families that are served through the transformers backend only."""
FURTHER = [("gemma3_text", "llm_pruner"), *((host, "ffn") for host in FURTHER_HOSTS)]
"""Hosts and recipes."""


def _cuts(*layers: int) -> dict[str, Any]:
    """Overrides with which these layers go, two more than are put in their place."""
    listed = {"method": "given_layers", "parameters": {"layers": list(layers)}}
    return {"n_layers": 2, "parameters.selection": listed}


TWO_CUTS = _cuts(1, 3)
"""Layers apart from each other, so that a patch stands in two places."""

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("streamline_none", {"n_layers": 2}),
    "layer": ("streamline", {"n_layers": 2}),
    "ffn": ("streamline_ffn", {"n_layers": 2}),
    "swiglu_res": ("streamline_swiglu_res", TWO_CUTS),
    "swiglu-before-first": (
        "streamline_swiglu",
        {"n_layers": 2, "parameters.start": 0, "parameters.allow_first_layer": True},
    ),
    "linear": ("ridge_map", TWO_CUTS),
    "replaceme": ("replaceme_lstsq", {"n_layers": 2}),
    "layer-at-two-cuts": ("streamline", _cuts(1, 2, 4, 5)),
    "two-layers-in-steps": ("streamline_two_layers", {"n_layers": 2, "parameters.iterations": 2}),
    "replaceme-at-two-cuts": ("replaceme_lstsq", TWO_CUTS),
    "laco": ("laco", {"n_layers": 2}),
    "llm_pruner": ("llm_pruner", {"sparsity": 0.2}),
    "llm_pruner-uniform": ("llm_pruner_uniform", {"sparsity": 0.3}),
    "slicegpt": ("slicegpt", {"sparsity": 0.2}),
}

SAME_CODE = {
    *("none", "layer", "layer-at-two-cuts", "two-layers-in-steps", "laco", "llm_pruner-uniform"),
    *("replaceme", "replaceme-at-two-cuts"),
}
"""Served by the host's stock class or by the way of a recipe that stays: one host is enough."""
SERVED = [
    (host, recipe)
    for host in HOSTS
    for recipe in ("dense", *RECIPES)
    if host == "llama" or recipe not in SAME_CODE
]
"""Hosts and recipes."""

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_dense(host: str, folder: Path) -> Path:
    """Save a random model whose weights and norms are drawn so wide that every mistake shows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            host, **{**SIZES, **HOSTS.get(host, {}), **FURTHER_HOSTS.get(host, {})}
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    _character_tokenizer().save_pretrained(folder)
    return folder


def compressed(source: Path, key: str, text: Path, folder: Path) -> Path:
    """Compress a model by one of ``RECIPES``."""
    from streamline_bench.compression import compress, load_recipe

    name, overrides = RECIPES[key]
    small = {
        "calibration": str(text),
        "calibration_samples": 16,
        "sequence_length": 16,
        **overrides,
    }
    recipe = load_recipe(name, small)
    if recipe.training.objective != "none":
        brief = {"training_samples": 16, "training.min_steps": 4, "training.batch_size": 4}
        recipe = load_recipe(name, {**small, **brief})
    compress(source, recipe, folder, progress=False)
    return folder


def greedy(folder: Path) -> list[list[int]]:
    """Return what transformers generates, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from streamline_bench.modeling import register

    register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def _character_tokenizer() -> Any:
    """A byte-level tokenizer: what every family's own tokenizer class can read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "Ġ", *map(chr, range(33, 127))]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


COMPILED = "llama/ffn, compiled"
HOSTED = "llama/ffn, hosted"
HOSTED_CLASS = "StreamlineTransformersForCausalLM"
NATIVE = ("ffn", "swiglu_res", "swiglu-before-first", "linear")
"""Served by our subclass of the host's own class, where there is one."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``host/recipe`` -> checkpoint."""
    pytest.importorskip("vllm", reason="vLLM is not installed (tox -e vllm)")
    root = tmp_path_factory.mktemp("models")
    text = root / "text.txt"
    lines = [" ".join(f"w{(i * 7 + j * 13) % 96}" for j in range(20)) for i in range(100)]
    text.write_text("\n\n".join(lines))
    made: dict[str, Path] = {}
    for host, key in FURTHER:
        dense = root / host if (root / host).exists() else save_dense(host, root / host)
        made[f"{host}/{key}"] = compressed(dense, key, text, root / f"{host}-{key}")
    for host, key in SERVED:
        made[f"{host}/{key}"] = (
            save_dense(host, root / host)
            if key == "dense"
            else compressed(root / host, key, text, root / f"{host}-{key}")
        )
    return made


@pytest.fixture(scope="module")
def served(serve: Callable[..., Any], folders: dict[str, Path]) -> dict[str, Any]:
    """Key -> answer of vLLM."""
    models: dict[str, dict[str, Any]] = {
        key: {"model": str(folder)} for key, folder in folders.items()
    }
    ffn = {"model": str(folders["llama/ffn"])}
    models[HOSTED] = {**ffn, "hf_overrides": {"architectures": [HOSTED_CLASS]}}
    models[COMPILED] = {**ffn, "enforce_eager": False}
    return dict(serve(models, PROMPTS, TOKENS))


@pytest.mark.parametrize(("host", "recipe"), SERVED)
def test_greedy_tokens_are_those_of_transformers(
    host: str, recipe: str, folders: dict[str, Path], served: dict[str, Any]
) -> None:
    answer = served[f"{host}/{recipe}"]
    assert "error" not in answer, answer["error"]
    assert answer["tokens"] == greedy(folders[f"{host}/{recipe}"])


@pytest.mark.parametrize(("host", "recipe"), FURTHER)
def test_further_hosts_are_served_through_the_transformers_backend(
    host: str, recipe: str, folders: dict[str, Path], served: dict[str, Any]
) -> None:
    answer = served[f"{host}/{recipe}"]
    assert "error" not in answer, answer["error"]
    assert answer["served_by"] == HOSTED_CLASS
    assert answer["tokens"] == greedy(folders[f"{host}/{recipe}"])


@pytest.mark.parametrize("recipe", NATIVE)
def test_networks_are_served_by_the_hosts_own_class(recipe: str, served: dict[str, Any]) -> None:
    names = {host: served[f"{host}/{recipe}"]["served_by"] for host in HOSTS}
    assert names == {
        "llama": "StreamlineLlamaForCausalLM",
        "mistral": "StreamlineMistralForCausalLM",
        "qwen2": "StreamlineQwen2ForCausalLM",
        "qwen3": "StreamlineQwen3ForCausalLM",
        "opt": HOSTED_CLASS,
    }


def test_both_ways_to_serve_a_network_agree(served: dict[str, Any]) -> None:
    assert served[HOSTED]["served_by"] == HOSTED_CLASS
    assert served[HOSTED]["tokens"] == served["llama/ffn"]["tokens"]


def test_compiled_as_the_host_class_is(served: dict[str, Any]) -> None:
    assert served[COMPILED].get("tokens") == served["llama/ffn"]["tokens"], served[COMPILED]
