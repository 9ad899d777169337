"""The bundled tasks: ten with choices, scored by PPL, and one of generation. No network."""

from opencompass.openicl.icl_evaluator import AccEvaluator
from opencompass.openicl.icl_inferencer import GenInferencer
from opencompass.openicl.icl_prompt_template import PromptTemplate
from opencompass.openicl.icl_retriever import ZeroRetriever

from streamline_bench.opencompass.datasets import BundledDataset, ExactMatchEvaluator
from streamline_bench.opencompass.inferencers import SharedPrefixPPLInferencer

_choices = dict(agreement=2, arithmetic=4, attributes=4, compare=2, counting=4, numbers=2, order=4,
                pairs=4, story=4, verify=2)  # fmt: skip

bundled_ppl_datasets = [
    dict(
        abbr=f"streamline_demo_{skill}",
        type=BundledDataset,
        skill=skill,
        reader_cfg=dict(
            input_columns=["context", *(f"choice{i}" for i in range(count))],
            output_column="gold",
        ),
        infer_cfg=dict(
            prompt_template=dict(
                type=PromptTemplate,
                template={i: f"{{context}} {{choice{i}}}" for i in range(count)},
            ),
            retriever=dict(type=ZeroRetriever),
            inferencer=dict(type=SharedPrefixPPLInferencer),
        ),
        eval_cfg=dict(evaluator=dict(type=AccEvaluator)),
    )
    for skill, count in _choices.items()
]

bundled_gen_datasets = [
    dict(
        abbr="streamline_demo_recall",
        type=BundledDataset,
        skill="recall",
        reader_cfg=dict(input_columns=["context"], output_column="answer"),
        infer_cfg=dict(
            prompt_template=dict(type=PromptTemplate, template="{context}"),
            retriever=dict(type=ZeroRetriever),
            inferencer=dict(type=GenInferencer, max_out_len=32, stopping_criteria=["."]),
        ),
        eval_cfg=dict(evaluator=dict(type=ExactMatchEvaluator)),
    )
]

bundled_datasets = [*bundled_ppl_datasets, *bundled_gen_datasets]
