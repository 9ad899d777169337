"""The bundled model, dense and pruned, on the bundled tasks: ``opencompass bundled.py --debug``.

Needs no network and no accelerator; ``--debug`` keeps everything in one process.
"""

from mmengine.config import read_base
from opencompass.partitioners import NaivePartitioner
from opencompass.runners import LocalRunner
from opencompass.tasks import OpenICLEvalTask, OpenICLInferTask

with read_base():
    from streamline_bench.opencompass.configs.bundled import bundled_datasets
    from streamline_bench.opencompass.configs.bundled_models import bundled_models
    from streamline_bench.opencompass.configs.summarizers import bundled_summarizer

models = bundled_models
datasets = bundled_datasets
summarizer = bundled_summarizer

infer = dict(
    partitioner=dict(type=NaivePartitioner, n=100),
    runner=dict(type=LocalRunner, max_num_workers=1, task=dict(type=OpenICLInferTask)),
)
eval = dict(
    partitioner=dict(type=NaivePartitioner, n=100),
    runner=dict(type=LocalRunner, max_num_workers=1, task=dict(type=OpenICLEvalTask)),
)
