from mmengine.config import read_base

with read_base():
    from streamline_bench.opencompass.configs.recipes import shortened_llama_taylor_models as models
