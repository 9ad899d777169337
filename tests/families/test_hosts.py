"""The ``streamline`` model type on hosts that the table does not list."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_models import draw_weights, tiny_config
from transformers import AutoModelForCausalLM

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.modeling import Attachment, register, streamline_config

register()

HOSTS = (
    "starcoder2", "bloom", "internlm3", "bamba", "mamba2", "nemotron_h", "gpt_neo", "qwen3_next",
)  # fmt: skip
ATTACHMENTS = [Attachment(-1, "swiglu_res", 16), Attachment(1, "ffn", 20)]


def build(host: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(streamline_config(tiny_config(host, 4), ATTACHMENTS))
    draw_weights(model)
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.mark.parametrize("host", HOSTS)
def test_networks_run_between_the_layers_of_any_host(host: str, tmp_path: Path) -> None:
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    model = build(host)
    layers = decoder_layers(model)
    ran: list[Any] = []
    for network in (layers[0].prelude, layers[1].attachment):
        network.register_forward_hook(lambda module, args, output: ran.append(module))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    assert ran == [layers[0].prelude, layers[1].attachment]
    for network in (layers[0].prelude, layers[1].attachment):
        network._forward_hooks.clear()
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    for parameter in loaded.parameters():  # a mapped file aligns them otherwise: other roundings
        parameter.data = parameter.data.clone()
    for twin in (loaded.eval(), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin(input_ids=ids, use_cache=False).logits, expected)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    loaded.generation_config.eos_token_id = None
    with_cache, without = (loaded.generate(ids, use_cache=use, **how) for use in (True, False))
    assert torch.equal(with_cache, without)
