from mmengine.config import read_base

with read_base():
    from streamline_bench.opencompass.configs.bundled_models import bundled_models as models
