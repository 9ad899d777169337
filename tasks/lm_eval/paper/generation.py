"""Scores of generated texts: ROUGE for summaries, the last yes or no for StrategyQA."""

from __future__ import annotations

import re
from typing import Any

_VERDICT = re.compile(r"answer is (yes|no)", re.IGNORECASE)


def rouge(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L (F1, stemmed, in percent) of one summary."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scores = RougeScorer(kinds, use_stemmer=True).score(document["summary"], results[0].strip())
    return {kind: 100 * scores[kind].fmeasure for kind in kinds}


def yes_or_no(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the verdict of an answer ("So the answer is yes.") is the right one."""
    verdict = _VERDICT.search(results[0])
    said = verdict.group(1).lower() if verdict else ""
    return {"exact_match": float(said == ("yes" if document["answer"] else "no"))}
