"""One model entry per recipe of ``baselines/``, at a quarter of the parameters removed; those whose
size is a paper's own ratio of heads, channels or width keep it.

The model is ``$STREAMLINE_BENCH_MODEL`` (a folder or hub id), else the paper's Llama 2 7B. An entry
is a plain dict: change ``path``, ``sparsity`` or ``run_cfg`` after importing it.
"""

import os

from streamline_bench.opencompass.models import StreamlineModel

_model = dict(
    type=StreamlineModel,
    path=os.environ.get("STREAMLINE_BENCH_MODEL", "meta-llama/Llama-2-7b-hf"),
    max_out_len=256,
    batch_size=32,
    run_cfg=dict(num_gpus=1),
)
_pruned = dict(**_model, sparsity=0.25)

dense_models = [dict(**_model, abbr="dense")]
first_layers_models = [dict(**_pruned, abbr="first_layers", recipe="first_layers")]
laco_models = [dict(**_pruned, abbr="laco", recipe="laco")]
laco_rdsc_models = [dict(**_pruned, abbr="laco_rdsc", recipe="laco_rdsc")]
last_layers_models = [dict(**_pruned, abbr="last_layers", recipe="last_layers")]
last_layers_lora_models = [dict(**_pruned, abbr="last_layers_lora", recipe="last_layers_lora")]
last_layers_partial_models = [
    dict(**_pruned, abbr="last_layers_partial", recipe="last_layers_partial")
]
linear_patch_models = [dict(**_pruned, abbr="linear_patch", recipe="linear_patch")]
llm_pruner_models = [dict(**_pruned, abbr="llm_pruner", recipe="llm_pruner")]
llm_pruner_lora_models = [dict(**_pruned, abbr="llm_pruner_lora", recipe="llm_pruner_lora")]
llm_pruner_paper_models = [dict(**_model, abbr="llm_pruner_paper", recipe="llm_pruner_paper")]
llm_pruner_uniform_models = [
    dict(**_pruned, abbr="llm_pruner_uniform", recipe="llm_pruner_uniform")
]
magnitude_l1_models = [dict(**_pruned, abbr="magnitude_l1", recipe="magnitude_l1")]
magnitude_l2_models = [dict(**_pruned, abbr="magnitude_l2", recipe="magnitude_l2")]
random_layers_models = [dict(**_pruned, abbr="random_layers", recipe="random_layers")]
replaceme_cosine_models = [dict(**_pruned, abbr="replaceme_cosine", recipe="replaceme_cosine")]
replaceme_lstsq_models = [dict(**_pruned, abbr="replaceme_lstsq", recipe="replaceme_lstsq")]
ridge_map_models = [dict(**_pruned, abbr="ridge_map", recipe="ridge_map")]
shortened_llama_ppl_models = [
    dict(**_pruned, abbr="shortened_llama_ppl", recipe="shortened_llama_ppl")
]
shortened_llama_taylor_models = [
    dict(**_pruned, abbr="shortened_llama_taylor", recipe="shortened_llama_taylor")
]
shortened_llama_taylor_plus_models = [
    dict(**_pruned, abbr="shortened_llama_taylor_plus", recipe="shortened_llama_taylor_plus")
]
shortgpt_models = [dict(**_pruned, abbr="shortgpt", recipe="shortgpt")]
sleb_models = [dict(**_pruned, abbr="sleb", recipe="sleb")]
slicegpt_models = [dict(**_pruned, abbr="slicegpt", recipe="slicegpt")]
slicegpt_lora_models = [dict(**_pruned, abbr="slicegpt_lora", recipe="slicegpt_lora")]
slicegpt_paper_models = [dict(**_model, abbr="slicegpt_paper", recipe="slicegpt_paper")]
streamline_models = [dict(**_pruned, abbr="streamline", recipe="streamline")]
streamline_ffn_models = [dict(**_pruned, abbr="streamline_ffn", recipe="streamline_ffn")]
streamline_ffn_res_models = [
    dict(**_pruned, abbr="streamline_ffn_res", recipe="streamline_ffn_res")
]
streamline_linear_models = [dict(**_pruned, abbr="streamline_linear", recipe="streamline_linear")]
streamline_lm_models = [dict(**_pruned, abbr="streamline_lm", recipe="streamline_lm")]
streamline_none_models = [dict(**_pruned, abbr="streamline_none", recipe="streamline_none")]
streamline_paper_models = [dict(**_pruned, abbr="streamline_paper", recipe="streamline_paper")]
streamline_swiglu_models = [dict(**_pruned, abbr="streamline_swiglu", recipe="streamline_swiglu")]
streamline_swiglu_res_models = [
    dict(**_pruned, abbr="streamline_swiglu_res", recipe="streamline_swiglu_res")
]
uidl_models = [dict(**_pruned, abbr="uidl", recipe="uidl")]
uidl_simple_models = [dict(**_pruned, abbr="uidl_simple", recipe="uidl_simple")]
