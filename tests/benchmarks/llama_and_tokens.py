"""The model that benchmarks run on, and its tokens: a trained one and its text, or random ones."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from streamline_bench.core.data.calibration import CalibrationTokens, load_calibration
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.modeling.loading import load_tokenizer


def llama_and_tokens(
    options: argparse.Namespace, samples: int, **config: Any
) -> tuple[LlamaForCausalLM, CalibrationTokens]:
    """Return a Llama in float32 on the CPU, and ``samples`` sequences of ``options.length`` tokens.

    Args:
        options: with ``model`` (a folder) also ``text``, and sizes are set to those of the model;
            else ``vocabulary``, ``hidden`` and ``layers`` are those of a random one.
        config: further entries of the config of a random one.
    """
    torch.manual_seed(0)
    if getattr(options, "model", None):
        trained = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        sizes = trained.config
        options.layers, options.hidden = sizes.num_hidden_layers, sizes.hidden_size
        options.vocabulary = sizes.vocab_size
        text = CalibrationSpec(source=options.text, sequence_length=options.length, samples=samples)
        return trained, load_calibration(text, load_tokenizer(options.model), progress=False)
    sizes = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        max_position_embeddings=options.length,
        **config,
    )
    model = LlamaForCausalLM(sizes).eval()
    ids = torch.randint(0, options.vocabulary, (samples, options.length))
    return model, CalibrationTokens.from_tensors(ids)
