from mmengine.config import read_base

with read_base():
    from streamline_bench.opencompass.configs.summarizers import bundled_summarizer as summarizer
