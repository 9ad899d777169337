from mmengine.config import read_base

with read_base():
    from streamline_bench.opencompass.configs.recipes import magnitude_l2_models as models
