"""Tables grouped as the paper groups its benchmarks: one line each, subjects averaged."""

from mmengine.config import read_base

with read_base():
    from opencompass.configs.summarizers.groups.cmmlu import cmmlu_summary_groups
    from opencompass.configs.summarizers.groups.mmlu import mmlu_summary_groups

_classification = [
    "cmnli", "hellaswag", "piqa", "chid-test", "WSC", "commonsense_qa", "BoolQ", "race-middle",
    "race-high", "mmlu", "cmmlu", "C3",
]  # fmt: skip
_generation = [["Xsum", "rouge1"], ["gsm8k", "accuracy"], ["strategyqa", "accuracy"]]

paper_summarizer = dict(
    dataset_abbrs=[
        "streamline_classification",
        *_classification,
        "streamline_generation",
        *_generation,
    ],
    summary_groups=[
        *mmlu_summary_groups,
        *cmmlu_summary_groups,
        dict(name="streamline_classification", subsets=_classification),
        dict(name="streamline_generation", subsets=_generation),
    ],
)

_skills = "agreement arithmetic attributes compare counting numbers order pairs story verify"
_bundled = [f"streamline_demo_{skill}" for skill in _skills.split()]
bundled_summarizer = dict(
    dataset_abbrs=["streamline_demo", *_bundled, "streamline_demo_recall"],
    summary_groups=[dict(name="streamline_demo", subsets=_bundled)],
)
