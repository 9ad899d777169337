"""``streamline-bench architecture``: from a config alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def write(folder: Path, **entries: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(entries))
    return str(folder)


SMALL = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
         "num_key_value_heads": 2, "num_hidden_layers": 4}  # fmt: skip


def test_an_inferred_family_from_its_config_alone(call: Callable[..., Any], tmp_path: Path) -> None:
    model = write(tmp_path / "m", model_type="diffllama", **SMALL)
    ended = call("architecture", model, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["source"] == "inferred"
    assert found["outside"]["layers"] == "model.layers"
    assert found["inside"]["query"] == "q_proj"
    assert set(found["refused_layers"]) == {"0", "1", "2"}  # behind the last, none is moved
    assert found["methods"]["shortgpt"] == ""
    assert "lambda_init" in found["refused_layers"]["1"]


def test_the_table(call: Callable[..., Any], tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    model = write(tmp_path / "m", model_type="olmo3", layer_types=kinds, **SMALL)
    ended = call("architecture", model)
    assert ended.code == 0, ended.err
    for part in ("inferred from the model itself", "model.layers", "0: sliding_attention", "sleb"):
        assert part in ended.out


def test_a_verified_family(call: Callable[..., Any]) -> None:
    found = json.loads(call("architecture", "bundled", "--json").out)
    assert (found["model_type"], found["source"]) == ("llama", "verified")
    assert not found["refused_layers"]
    assert [name for name, why in found["methods"].items() if why] == ["expert_pruning"]


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"model_type": "bert"}, "both directions"),
        ({"model_type": "nothing"}, "nothing"),
        ({"model_type": "starcoder2", "hidden_size": "64"}, "config"),
    ],
)
def test_bad_input_is_one_sentence(
    entries: dict[str, Any], named: str, call: Callable[..., Any], tmp_path: Path
) -> None:
    ended = call("architecture", write(tmp_path / "m", **entries))
    assert ended.code == 2
    assert named in ended.err
    assert len(ended.err.strip().splitlines()) == 1


REMOTE_CONFIG = """
from transformers import PretrainedConfig
class OwnConfig(PretrainedConfig):
    model_type = "own"
    def __init__(self, depth=3, width=16, vocab_size=50, **kwargs):
        self.depth, self.width, self.vocab_size = depth, width, vocab_size
        self.num_layers = depth
        super().__init__(**kwargs)
"""
REMOTE_MODEL = """
from torch import nn
from transformers import PreTrainedModel
from .configuration_own import OwnConfig
class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)
    def forward(self, x):
        return x + self.mix(self.norm(x))
class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "body"
    def __init__(self, config):
        super().__init__(config)
        self.body = nn.Module()
        self.body.table = nn.Embedding(config.vocab_size, config.width)
        self.body.stack = nn.ModuleList(Layer(config.width) for _ in range(config.num_layers))
        self.body.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()
    def get_input_embeddings(self):
        return self.body.table
    def get_output_embeddings(self):
        return self.head
    def forward(self, input_ids, **kwargs):
        x = self.body.table(input_ids)
        for layer in self.body.stack:
            x = layer(x)
        return self.head(self.body.norm(x))
"""


def test_code_that_comes_with_a_model(call: Callable[..., Any], tmp_path: Path) -> None:
    auto = {"AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}  # fmt: skip
    model = write(tmp_path / "own", model_type="own", auto_map=auto, num_layers=3)
    (tmp_path / "own" / "configuration_own.py").write_text(REMOTE_CONFIG)
    (tmp_path / "own" / "modeling_own.py").write_text(REMOTE_MODEL)
    assert call("architecture", model).code == 2
    ended = call("architecture", model, "--trust-remote-code", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["outside"]["layers"] == "body.stack"
    assert found["outside"]["lm_head"] == "head"
    assert found["outside"]["final_norm"] == "body.norm"
    assert found["outside"]["depth_key"] == "num_layers"
