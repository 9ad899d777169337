"""The bundled model, dense and without a quarter of its parameters; for a CPU, no network."""

import os

from streamline_bench.opencompass.models import StreamlineModel

_package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

_bundled = dict(
    type=StreamlineModel,
    path=os.path.join(_package, "demo", "model"),
    device="cpu",
    max_out_len=32,
    batch_size=64,
    run_cfg=dict(num_gpus=0),
)

bundled_models = [
    dict(**_bundled, abbr="dense"),
    dict(**_bundled, abbr="streamline_none", recipe="streamline_none", sparsity=0.25,
         sequence_length=128),
]  # fmt: skip
