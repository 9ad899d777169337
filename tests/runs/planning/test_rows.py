"""Names, groups and rows of one's own become labelled recipes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streamline_bench.compression.recipes import list_recipes, load_recipe, recipe_groups
from streamline_bench.errors import CheckpointError, RecipeError
from streamline_bench.runs.jobs.planned import plan_jobs
from streamline_bench.runs.planning.request import Request, RowRequest, make_request, read_request
from streamline_bench.runs.planning.resolve import resolve_plan
from streamline_bench.runs.planning.rows import GROUPS, resolve_rows


def _labels(request: Request) -> list[str]:
    return [row.label for row in resolve_rows(request)]


def test_dense_is_put_first_where_it_is_missing(make: Callable[..., Request]) -> None:
    assert _labels(make(recipes=["first_layers"])) == ["dense", "first_layers"]
    assert _labels(make(recipes=["first_layers", "dense"])) == ["first_layers", "dense"]


def test_all_is_every_recipe_once_dense_first(make: Callable[..., Request]) -> None:
    request = make(recipes=["all"], set={})
    labels = _labels(request)
    assert labels[0] == "dense"
    everywhere = [name for name in list_recipes() if not load_recipe(name).mixtures_only]
    assert sorted(labels) == sorted(everywhere)
    with_experts = _labels(make(recipes=["dense", "experts"], set={}))
    assert with_experts == ["dense", "expert_frequency", "expert_random", "reap"]


def test_a_group_does_not_repeat_what_was_named_before(make: Callable[..., Request]) -> None:
    labels = _labels(make(recipes=["first_layers", "no-training"]))
    assert labels.count("first_layers") == 1
    assert {"dense", "last_layers", "magnitude_l1"} <= set(labels)
    assert "streamline" not in labels


def test_a_minus_takes_away_a_group_or_a_recipe(make: Callable[..., Request]) -> None:
    labels = _labels(make(recipes=["all", "-recovered", "-paper-settings", "-sleb"], set={}))
    kept = [
        recipe.name
        for recipe in map(load_recipe, list_recipes())
        if recipe.cost != "recovered"
        and not recipe.paper_settings
        and recipe.name != "sleb"
        and not recipe.mixtures_only
    ]
    assert sorted(labels) == sorted(kept)
    with pytest.raises(RecipeError, match=r"-recoverd.*'recovered'"):
        resolve_rows(make(recipes=["all", "-recoverd"], set={}))
    with pytest.raises(RecipeError, match="-sleb"):
        resolve_rows(make(recipes=["dense", "-sleb"], set={}))


def test_groups_tell_what_the_recipes_say() -> None:
    groups = recipe_groups()
    assert set(groups) == set(GROUPS)
    for name, recipe in ((name, load_recipe(name)) for name in list_recipes()):
        assert [group for group in groups if name in groups[group]] == [
            group
            for group in groups
            if (group in ("all", recipe.cost.replace(" ", "-")) and not recipe.mixtures_only)
            or (group == "experts" and recipe.mixtures_only)
            or (group == "paper-settings" and recipe.paper_settings)
            or (group == "hub-data" and set(recipe.data_sources) != {"auto"})
        ]


def test_a_rows_own_values_win_and_one_size_replaces_the_other(
    make: Callable[..., Request],
) -> None:
    own = RowRequest(label="half", recipe="first_layers", overrides={"sparsity": 0.5})
    rows = {row.label: row.recipe for row in resolve_rows(make(recipes=["first_layers", own]))}
    assert (rows["first_layers"].n_layers, rows["first_layers"].sparsity) == (2, None)
    assert (rows["half"].n_layers, rows["half"].sparsity) == (None, 0.5)
    sliced = RowRequest(label="s", recipe="slicegpt", overrides={"parameters.slicing": 0.25})
    (_, row) = resolve_rows(make(recipes=[sliced]))
    assert (row.recipe.n_layers, row.recipe.sparsity) == (None, None)
    assert row.recipe.parameters["slicing"] == 0.25


def test_common_values_reach_the_rows_that_read_them(make: Callable[..., Request]) -> None:
    common = {"n_layers": 2, "training.epochs": 3, "sequence_length": 64}
    request = make(recipes=["sleb", "streamline"], set=common)
    _, sleb, streamline = (row.recipe for row in resolve_rows(request))
    assert (sleb.training.epochs, streamline.training.epochs) == (1, 3)
    assert sleb.calibration.sequence_length == streamline.calibration.sequence_length == 64
    with pytest.raises(RecipeError, match=r"training\.epochs.*sleb, shortgpt"):
        resolve_rows(make(recipes=["sleb", "shortgpt"], set=common))
    asked = {"calibration": "x.txt", "n_layers": 2}
    both = make(recipes=["last_layers", "sleb"], set=asked)
    resolve_rows(both, asked)
    unread = make(recipes=["last_layers", "dense"], set=asked)
    resolve_rows(unread)  # of a plan whose other rows were left out
    with pytest.raises(RecipeError, match="'calibration' has no effect"):
        resolve_rows(unread, asked)
    seeded = RowRequest(label="x", recipe="last_layers", overrides={"seed": 1})
    with pytest.raises(RecipeError, match="'seed' has no effect"):
        resolve_rows(make(recipes=[seeded]))
    own = RowRequest(label="x", recipe="sleb", overrides={"replacement": "ffn"})
    with pytest.raises(RecipeError, match="method 'sleb' does not read 'replacement'"):
        resolve_rows(make(recipes=[own], set={"n_layers": 2}))


def test_values_in_place_of_a_recipes_own_are_said_once(
    make: Callable[..., Request], caplog: pytest.LogCaptureFixture
) -> None:
    own = load_recipe("laco").calibration.samples
    sizes = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    common = {"sparsity": sizes, "calibration.samples": 32}
    with caplog.at_level("INFO", "streamline_bench"):
        resolve_rows(make(recipes=["laco", "last_layers"], set=common))
    said = [record.getMessage() for record in caplog.records]
    first = ", ".join(f"laco-{size}" for size in sizes[:6])
    assert said == [
        f"{first} and 1 more: calibration.samples is 32, the recipe's own is {own}",
    ]


@pytest.mark.parametrize(
    "label",
    [
        *("jobs", "Noise", "throughput", "throughput.json", "plan.yaml", "Run.json", "report"),
        *("leaderboard.html", "Leaderboard.xlsx", "model-cards"),
        *("a/b", "..", ".hidden", "a b", "x" * 200),
    ],
)
def test_a_label_must_be_able_to_name_a_folder(make: Callable[..., Request], label: str) -> None:
    with pytest.raises(RecipeError, match="cannot name a folder"):
        resolve_rows(make(recipes=[RowRequest(label=label, recipe="first_layers")]))


def test_labels_must_differ_also_where_case_does_not_count(
    make: Callable[..., Request],
) -> None:
    rows = [RowRequest(label=label, recipe="first_layers") for label in ("a", "A")]
    with pytest.raises(RecipeError, match="Two rows are called 'A'"):
        resolve_rows(make(recipes=rows))


def test_axes_span_the_rows_that_read_them(make: Callable[..., Request]) -> None:
    request = make(recipes=["last_layers", "random_layers"],
                   set={"sparsity": [0.25, 0.5], "seed": [0, 1]})  # fmt: skip
    rows = {row.label: row for row in resolve_rows(request)}
    assert list(rows) == [
        *("dense", "last_layers-0.25", "last_layers-0.5"),
        *("random_layers-0.25-seed0", "random_layers-0.25-seed1"),
        *("random_layers-0.5-seed0", "random_layers-0.5-seed1"),
    ]
    row = rows["random_layers-0.5-seed1"]
    assert (row.recipe.sparsity, row.recipe.seed) == (0.5, 1)
    assert (row.group, row.axes) == ("random_layers", {"sparsity": 0.5, "seed": 1})
    assert rows["last_layers-0.5"].axes == {"sparsity": 0.5}


def test_calibration_texts_are_an_axis_of_the_rows_that_read_them(
    make: Callable[..., Request],
) -> None:
    texts = ["one/wiki.jsonl", "two/wiki.jsonl"]
    request = make(recipes=["sleb", "last_layers"], set={"n_layers": 2, "calibration": texts})
    assert _labels(request) == ["dense", "sleb-text0", "sleb-text1", "last_layers"]
    # A row that reads none is the same row whatever text the others have.
    alone = resolve_rows(make(recipes=["sleb", "last_layers"],
                              set={"n_layers": 2, "calibration": "one.jsonl"}))  # fmt: skip
    assert alone[-1].recipe == resolve_rows(request)[-1].recipe


def test_an_axis_that_no_row_reads_is_refused(make: Callable[..., Request]) -> None:
    with pytest.raises(RecipeError, match=r"'seed' has no effect.*last_layers"):
        resolve_rows(make(recipes=["last_layers"], set={"n_layers": 2, "seed": [0, 1]}))
    own = RowRequest(recipe="last_layers", overrides={"seed": [0, 1]})
    with pytest.raises(RecipeError, match=r"'seed' has no effect.*last_layers"):
        resolve_rows(make(recipes=[own]))
    with pytest.raises(RecipeError, match="'n_layers' has 2 twice"):
        resolve_rows(make(set={"n_layers": [2, 2]}))


def test_a_checkpoint_needs_a_folder_with_safe_weights(
    make: Callable[..., Request], tmp_path: Path
) -> None:
    def asked(folder: Path, **more: object) -> Request:
        return make(recipes=[RowRequest(label="x", checkpoint=str(folder), **more)])

    with pytest.raises(CheckpointError, match=r"Row 'x': .*gone does not exist"):
        resolve_plan(asked(tmp_path / "gone"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"Row 'x': .*pickles"):
        resolve_plan(asked(tmp_path))
    with pytest.raises(RecipeError, match=r"'nobody', which is not a dense row.*dense"):
        resolve_rows(asked(tmp_path, reference="nobody"))


def test_another_tokenizer_leaves_token_distributions_out(
    make: Callable[..., Request], tiny_llama: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    (other / "special_tokens_map.json").write_text('{"eos_token": "w9"}', encoding="utf-8")
    (tmp_path / "text.txt").write_text("w1 w2 w3", encoding="utf-8")
    rows = [RowRequest(label="x", checkpoint=str(other)), "last_layers"]
    plan = resolve_plan(make(recipes=rows, text=str(tmp_path / "text.txt")))
    names = [job.name for job in plan_jobs(plan)]
    assert "score-x" in names
    assert [name for name in names if name.startswith("text")] == ["text-last_layers"]


def test_the_released_models_are_found_without_a_hub() -> None:
    rows = {row.label: row for row in resolve_rows(make_request(read_request("released_models")))}
    assert [label for label, row in rows.items() if row.is_dense] == ["Llama-2-7B", "Llama-3.1-8B"]
    assert rows["Llama-3.1-5.4B"].reference == "Llama-3.1-8B"
    assert all(len(row.published) == 7 for row in rows.values())
    assert {each.model for each in rows["Llama-2-4.7B"].published} == {"Llama-2-4.7B"}


def test_an_unknown_recipe_and_an_unknown_key_are_named(make: Callable[..., Request]) -> None:
    with pytest.raises(RecipeError, match="did you mean 'shortgpt'"):
        resolve_rows(make(recipes=["shortgtp"]))
    with pytest.raises(RecipeError, match="sparisty"):
        resolve_rows(make(set={"sparisty": 0.5}))


@pytest.mark.parametrize("name", ["bundled", "stories260k", "stories260k_half"])
def test_plans_that_come_along_can_be_read(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STREAMLINE_BENCH_DATA", str(tmp_path))
    payload = read_request(name)
    request = make_request({"tasks": ["t"], **payload})
    labels = _labels(request)
    assert labels[0] == "dense"
    assert len(labels) > 15
    if name.startswith("stories260k"):
        assert request.model == f"{tmp_path}/models/stories260K"


def test_a_plan_with_a_variable_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STREAMLINE_BENCH_DATA", raising=False)
    with pytest.raises(RecipeError, match="export STREAMLINE_BENCH_DATA"):
        read_request("stories260k")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("modle: x\n", "did you mean 'model'"),
        ("[1, 2]\n", "is not a plan"),
        ("a: [\n", "cannot be read as YAML"),
        ("model: \xff\xfe", "cannot be read as YAML"),
    ],
)
def test_plan_files_that_are_none(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match=sentence):
        read_request(str(path))


def test_plan_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        read_request(str(tmp_path / "plan.yaml"))
    with pytest.raises(RecipeError, match="did you mean 'bundled'"):
        read_request("bundeld")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": "0"}, "batch_size"),
        ({"limit": -1}, "limit"),
        ({"throughput": "tgi"}, "throughput"),
        ({"tasks": []}, "tasks"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_values_that_cannot_be(
    make: Callable[..., Request], change: dict[str, object], sentence: str
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        make(**change)
