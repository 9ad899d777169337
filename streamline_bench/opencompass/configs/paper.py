"""The benchmarks of the LLM-Streamline paper (arXiv:2403.19135, table 1) by OpenCompass's configs.

Twelve classification benchmarks (RACE counts twice) and three of generation. OpenCompass's default
config of CommonsenseQA needs sentence-transformers, faiss and a download; ``c49e77`` shows eight
fixed examples instead.
"""

from mmengine.config import read_base

with read_base():
    from opencompass.configs.datasets.CLUE_C3.CLUE_C3_ppl import C3_datasets
    from opencompass.configs.datasets.CLUE_cmnli.CLUE_cmnli_ppl import cmnli_datasets
    from opencompass.configs.datasets.cmmlu.cmmlu_ppl import cmmlu_datasets
    from opencompass.configs.datasets.commonsenseqa.commonsenseqa_ppl_c49e77 import (
        commonsenseqa_datasets,
    )
    from opencompass.configs.datasets.FewCLUE_chid.FewCLUE_chid_ppl import chid_datasets
    from opencompass.configs.datasets.gsm8k.gsm8k_gen import gsm8k_datasets
    from opencompass.configs.datasets.hellaswag.hellaswag_ppl import hellaswag_datasets
    from opencompass.configs.datasets.mmlu.mmlu_ppl import mmlu_datasets
    from opencompass.configs.datasets.piqa.piqa_ppl import piqa_datasets
    from opencompass.configs.datasets.race.race_ppl import race_datasets
    from opencompass.configs.datasets.strategyqa.strategyqa_gen import strategyqa_datasets
    from opencompass.configs.datasets.SuperGLUE_BoolQ.SuperGLUE_BoolQ_ppl import BoolQ_datasets
    from opencompass.configs.datasets.SuperGLUE_WSC.SuperGLUE_WSC_ppl import WSC_datasets
    from opencompass.configs.datasets.Xsum.Xsum_gen import Xsum_datasets

classification_datasets = [
    *cmnli_datasets, *hellaswag_datasets, *piqa_datasets, *chid_datasets, *WSC_datasets,
    *commonsenseqa_datasets, *BoolQ_datasets, *race_datasets, *mmlu_datasets, *cmmlu_datasets,
    *C3_datasets,
]  # fmt: skip
generation_datasets = [*Xsum_datasets, *gsm8k_datasets, *strategyqa_datasets]
paper_datasets = [*classification_datasets, *generation_datasets]
