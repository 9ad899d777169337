"""Documents of CLUE's CHID (`clue/clue`, config `chid`): one per gap."""

from __future__ import annotations

import re
from typing import Any

import datasets

_GAP = re.compile(r"#idiom\d+#")


def one_idiom_per_document(documents: datasets.Dataset) -> datasets.Dataset:
    """Split texts with several gaps; the other gaps are filled with their right idioms.

    A document of the data set holds ``content`` (texts), ``candidates`` (ten idioms for all gaps)
    and ``answers`` (``text`` and ``candidate_id`` of every gap, in order of appearance).
    """
    rows: list[dict[str, Any]] = []
    for document in documents:
        answers = list(
            zip(document["answers"]["text"], document["answers"]["candidate_id"], strict=True)
        )
        position = 0
        for text in document["content"]:
            gaps = list(_GAP.finditer(text))
            here = answers[position : position + len(gaps)]
            position += len(gaps)
            for number, (gap, (_, gold)) in enumerate(zip(gaps, here, strict=True)):
                others = iter(idiom for idiom, _ in here[:number] + here[number + 1 :])
                before = _GAP.sub(lambda _: next(others), text[: gap.start()])  # noqa: B023
                after = _GAP.sub(lambda _: next(others), text[gap.end() :])  # noqa: B023
                choices = [idiom + after for idiom in document["candidates"]]
                rows.append({"before": before, "choices": choices, "gold": int(gold)})
    return datasets.Dataset.from_list(rows)
