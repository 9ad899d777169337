"""One line of lm-eval's samples: choices, lengths, gold and verdict in the less common forms."""

from __future__ import annotations

from typing import Any

import pytest

from streamline_bench.errors import SamplesError
from streamline_bench.stability.readers.lm_eval_rows import parse_row, task_facts


def facts(chat_template: str | None = None, **config: Any):
    results = {"configs": {"t": config}, "versions": {"t": 2.0}, "chat_template": chat_template}
    return task_facts("t", results)


def line(requests: list[tuple[str, Any]], answers: list[Any], **fields: Any) -> dict[str, Any]:
    return {
        "doc_id": 3, "target": "1", "doc_hash": "d", "prompt_hash": "p", "target_hash": "t",
        "arguments": {f"gen_args_{i}": {"arg_0": a, "arg_1": b}
                      for i, (a, b) in enumerate(requests)},
        "filtered_resps": answers, "filter": "none", **fields,
    }  # fmt: skip


def scores(*values: float) -> list[list[str]]:
    return [[str(value), "False"] for value in values]


CHOICES = [("q", " no"), ("q", " yes")]


def test_delimiter_is_not_part_of_the_choice() -> None:
    row = parse_row(line(CHOICES, scores(-1, -2)), facts(), "f")
    assert row["choices"] == ["no", "yes"] and row["lengths"] == [2, 3]


def test_with_a_chat_template_the_harness_drops_the_delimiter() -> None:
    plain = [("q", "no"), ("q", "yes")]
    assert parse_row(line(plain, scores(-1, -2)), facts("<chat>"), "f")["lengths"] == [2, 3]
    # A choice that itself starts with a space keeps it.
    row = parse_row(line(CHOICES, scores(-1, -2)), facts("<chat>"), "f")
    assert row["choices"] == [" no", " yes"]
    kept = facts("<chat>", gen_prefix="Answer:")
    assert parse_row(line(CHOICES, scores(-1, -2)), kept, "f")["choices"] == ["no", "yes"]


def test_more_than_ten_choices_keep_their_order() -> None:
    requests = [("q", f" {chr(97 + i)}") for i in range(12)]
    row = parse_row(line(requests, scores(*range(-12, 0))), facts(), "f")
    assert row["choices"] == list("abcdefghijkl") and row["prediction"] == 11


def test_bytes_are_counted_in_utf8() -> None:
    row = parse_row(line([("q", " é"), ("q", " 你好")], scores(-1, -2)), facts(), "f")
    assert row["lengths"] == [1, 2] and row["byte_lengths"] == [2, 6]


def test_mutual_information_scores_are_not_choices() -> None:
    config = facts(metric_list=[{"metric": "acc_mutual_info"}])
    requests = [*CHOICES, ("", " no"), ("", " yes")]
    row = parse_row(line(requests, scores(-3, -2, -1, -1)), config, "f")
    assert row["choices"] == ["no", "yes"] and row["prediction"] == 1
    assert row["loglikelihoods"] == [-3.0, -2.0]


@pytest.mark.parametrize(
    ("target", "acc", "gold"),
    [("1", 1.0, 1), ("0", 0.0, 0), ("yes", 1.0, 1), ("no", 0.0, 0), ("[0, 1]", 1.0, None),
     ("7", 0.0, None), ("0", 1.0, None)],
)  # fmt: skip
def test_gold_is_an_index_or_a_text_and_never_contradicts_acc(
    target: str, acc: float, gold: int | None
) -> None:
    source = line(CHOICES, scores(-2, -1), target=target, metrics=["acc"], acc=acc)
    assert parse_row(source, facts(), "f")["gold"] == gold


def test_digits_as_choices() -> None:
    """Target "1" may be an index or the text of choice 0: acc decides."""
    source = line([("q", " 1"), ("q", " 0")], scores(-1, -2), metrics=["acc"], acc=1.0)
    assert parse_row(source, facts(), "f")["gold"] == 0


def test_first_known_verdict_decides() -> None:
    row = parse_row(
        line(CHOICES, scores(-1, -2), metrics=["f1", "exact_match"], f1=[1, 0], exact_match=0.0),
        facts(),
        "f",
    )
    assert row["verdict_metric"] == "exact_match" and row["correct"] is False
    assert row["metrics"] == {"f1.0": 1.0, "f1.1": 0.0, "exact_match": 0.0}
    graded = line(CHOICES, scores(-1, -2), metrics=["acc"], acc=0.37)
    assert parse_row(graded, facts(), "f")["correct"] is None


def test_generation_with_repeats_keeps_all_texts() -> None:
    generation = facts(output_type="generate_until")
    one = parse_row(line([("q", {"until": []})], ["a"]), generation, "f")
    assert one["text"] == "a"
    many = parse_row(line([("q", {"until": []})], [["a", "b"]]), generation, "f")
    assert many["text"] == '["a", "b"]'


def test_request_hash_sees_what_prompt_hash_does_not() -> None:
    first = parse_row(line(CHOICES, scores(-1, -2)), facts(), "f")
    other = parse_row(line([("q", " no"), ("q", "yes")], scores(-1, -2)), facts(), "f")
    assert first["prompt_hash"] == other["prompt_hash"]
    assert first["request_hash"] != other["request_hash"]


def test_answers_and_requests_must_match() -> None:
    with pytest.raises(SamplesError, match=r"f: not a sample .*1 answers to 2 requests"):
        parse_row(line(CHOICES, scores(-1)), facts(), "f")
