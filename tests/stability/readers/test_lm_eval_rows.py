"""One line of lm-eval's samples: choices, lengths, gold and verdict in the less common forms."""

from __future__ import annotations

import json
from typing import Any

import pytest

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.readers.lm_eval_rows import TaskConfig, TaskFacts, parse_row
from streamline_bench.stability.samples import Row


def facts(*, chat: bool = False, **config: Any) -> TaskFacts:
    return TaskFacts("t", "2.0", TaskConfig.model_validate(config), chat)


def parsed(line: dict[str, Any], of: TaskFacts | None = None) -> Row:
    return parse_row(json.dumps(line).encode(), of or facts(), "f")


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
    row = parsed(line(CHOICES, scores(-1, -2)))
    assert row.choices == ["no", "yes"] and row.lengths == [2, 3]


def test_with_a_chat_template_the_harness_drops_the_delimiter() -> None:
    plain = [("q", "no"), ("q", "yes")]
    assert parsed(line(plain, scores(-1, -2)), facts(chat=True)).lengths == [2, 3]
    # A choice that itself starts with a space keeps it.
    row = parsed(line(CHOICES, scores(-1, -2)), facts(chat=True))
    assert row.choices == [" no", " yes"]
    kept = facts(chat=True, gen_prefix="Answer:")
    assert parsed(line(CHOICES, scores(-1, -2)), kept).choices == ["no", "yes"]


def test_more_than_ten_choices_keep_their_order() -> None:
    requests = [("q", f" {chr(97 + i)}") for i in range(12)]
    row = parsed(line(requests, scores(*range(-12, 0))))
    assert row.choices == list("abcdefghijkl") and row.prediction == 11


def test_bytes_are_counted_in_utf8() -> None:
    row = parsed(line([("q", " é"), ("q", " 你好")], scores(-1, -2)))
    assert row.lengths == [1, 2] and row.byte_lengths == [2, 6]


def test_mutual_information_scores_are_not_choices() -> None:
    config = facts(metric_list=[{"metric": "acc_mutual_info"}])
    requests = [*CHOICES, ("", " no"), ("", " yes")]
    row = parsed(line(requests, scores(-3, -2, -1, -1)), config)
    assert row.choices == ["no", "yes"] and row.prediction == 1
    assert row.loglikelihoods == [-3.0, -2.0]


@pytest.mark.parametrize(
    ("target", "acc", "gold"),
    [("1", 1.0, 1), ("0", 0.0, 0), ("yes", 1.0, 1), ("no", 0.0, 0), ("[0, 1]", 1.0, None),
     ("7", 0.0, None), ("0", 1.0, None)],
)  # fmt: skip
def test_gold_is_an_index_or_a_text_and_never_contradicts_acc(
    target: str, acc: float, gold: int | None
) -> None:
    source = line(CHOICES, scores(-2, -1), target=target, metrics=["acc"], acc=acc)
    assert parsed(source).gold == gold


def test_digits_as_choices() -> None:
    """Target "1" may be an index or the text of choice 0: acc decides."""
    source = line([("q", " 1"), ("q", " 0")], scores(-1, -2), metrics=["acc"], acc=1.0)
    assert parsed(source).gold == 0


def test_first_known_verdict_decides() -> None:
    row = parsed(
        line(CHOICES, scores(-1, -2), metrics=["f1", "exact_match"], f1=[1, 0], exact_match=0.0)
    )
    assert row.verdict_metric == "exact_match" and row.correct is False
    assert row.metrics == {"f1.0": 1.0, "f1.1": 0.0, "exact_match": 0.0}
    graded = line(CHOICES, scores(-1, -2), metrics=["acc"], acc=0.37)
    assert parsed(graded).correct is None


def test_generation_with_repeats_keeps_all_texts() -> None:
    generation = facts(output_type="generate_until")
    one = parsed(line([("q", {"until": []})], ["a"]), generation)
    assert one.text == "a"
    many = parsed(line([("q", {"until": []})], [["a", "b"]]), generation)
    assert many.text == '["a", "b"]'


def test_request_hash_sees_what_prompt_hash_does_not() -> None:
    first = parsed(line(CHOICES, scores(-1, -2)))
    other = parsed(line([("q", " no"), ("q", "yes")], scores(-1, -2)))
    assert first.prompt_hash == other.prompt_hash
    assert first.request_hash != other.request_hash


def test_answers_and_requests_must_match() -> None:
    with pytest.raises(SamplesError, match=r"^f: .*1 answers to 2 requests"):
        parsed(line(CHOICES, scores(-1)))


@pytest.mark.parametrize("value", ["nan", "-inf", float("nan"), None, "x", {}])
def test_a_score_that_is_no_number_names_line_and_choice(value: Any) -> None:
    with pytest.raises((NumericsError, SamplesError), match=r"^f: "):
        parsed(line(CHOICES, [["-1", "False"], [value, "False"]]))


@pytest.mark.parametrize(
    "change",
    [
        {"doc_id": 2**63}, {"doc_id": -1}, {"doc_id": "x"}, {"arguments": {}}, {"arguments": []},
        {"arguments": {"gen_args": {"arg_0": "q"}}}, {"arguments": {"gen_args_0": {}}},
        {"filtered_resps": None}, {"doc_hash": 7}, {"filter": 3}, {"metrics": {"acc": 1}},
        {"metrics": ["acc"], "acc": 10**400}, {"metrics": ["f"], "f": [10**400]},
        {"target": "9" * 5000},
    ],
)  # fmt: skip
def test_damage_is_one_sentence(change: dict[str, Any]) -> None:
    with pytest.raises(SamplesError, match=r"^f: .*evaluate again"):
        parsed({**line(CHOICES, scores(-1, -2)), **change})


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b'{"a": "\\ud83d"}', b"[" * 5000, b"\xff"])
def test_what_is_no_json_object_is_one_sentence(content: bytes) -> None:
    with pytest.raises(SamplesError, match=r"^f: "):
        parse_row(content, facts(), "f")


def test_equal_scores_choose_the_first() -> None:
    row = parsed(line(CHOICES, scores(-2, -2)))
    assert row.prediction == 0
    assert row.prediction_norm == 1  # "yes" is longer: -2/3 is above -2/2


def test_an_empty_choice_has_no_length_to_divide_by() -> None:
    row = parsed(line([("q", " "), ("q", " yes")], scores(-1, -2)))
    assert row.lengths == [0, 3] and row.prediction == 0 and row.prediction_norm is None


def test_choices_inside_the_context_begin_after_the_shared_words() -> None:
    requests = [("the cat saw", " it."), ("the car saw", " it.")]
    row = parsed(line(requests, scores(-1, -2), target="it.", metrics=["acc"], acc=0.0))
    assert row.prompt == "the "
    assert row.choices == ["cat saw it.", "car saw it."]
    assert row.prediction_norm is None and row.lengths == [3, 3]
    assert row.gold == 1, "of two choices, the other one"


def test_a_single_score_predicts_nothing() -> None:
    row = parsed(line([("q", " yes")], scores(-3)), facts(output_type="loglikelihood"))
    assert row.loglikelihoods == [-3.0] and row.choices == ["yes"]
    assert (row.prediction, row.prediction_norm, row.gold) == (None, None, None)


def test_rolling_has_scores_only() -> None:
    of = facts(output_type="loglikelihood_rolling")
    row = parsed(line([("whole text", "")], scores(-9)), of)
    assert row.loglikelihoods == [-9.0] and row.choices is None and row.lengths is None


def test_identity_is_the_lines_own() -> None:
    row = parsed(line(CHOICES, scores(-1, -2), doc={"q": 1}, filter="strict"))
    assert (row.task, row.task_version, row.output_type) == ("t", "2.0", "multiple_choice")
    assert (row.doc_id, row.doc_hash, row.prompt_hash, row.target_hash) == (3, "d", "p", "t")
    assert (row.filter, row.target, row.prompt, row.cluster) == ("strict", "1", "q", None)


def test_acc_norm_is_a_verdict_of_its_own() -> None:
    row = parsed(line(CHOICES, scores(-1, -2), metrics=["acc", "acc_norm"], acc=0.0, acc_norm=1.0))
    assert (row.correct, row.verdict_metric, row.correct_norm) == (False, "acc", True)
    graded = parsed(line(CHOICES, scores(-1, -2), metrics=["acc_norm"], acc_norm=0.5))
    assert (graded.correct, graded.correct_norm) == (None, None)
