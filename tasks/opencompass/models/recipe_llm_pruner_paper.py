from mmengine.config import read_base

with read_base():
    from streamline_bench.opencompass.configs.recipes import llm_pruner_paper_models as models
