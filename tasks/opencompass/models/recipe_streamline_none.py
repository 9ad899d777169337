from mmengine.config import read_base

with read_base():
    from streamline_bench.opencompass.configs.recipes import streamline_none_models as models
