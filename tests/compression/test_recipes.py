"""Recipes: found by name or path, overridden, hashed by what decides the result."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from streamline_bench.compression import compress, list_recipes, load_recipe
from streamline_bench.compression.recipes import applicable, refuse_unread
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.errors import RecipeError
from streamline_bench.methods.base import METHODS, Method, get_method


def test_every_recipe_loads() -> None:
    names = list(list_recipes())
    assert len(names) >= 9
    for name in names:
        assert load_recipe(name).name == name


def test_overrides_reach_nested_keys() -> None:
    recipe = load_recipe(
        "streamline", {"calibration": "x.txt", "training.lr": "1e-3", "replacement": "ffn"}
    )
    assert recipe.calibration.source == recipe.training.data.source == "x.txt"
    assert recipe.training.lr == 1e-3
    assert recipe.replacement.kind == "ffn"


def test_a_training_preset_stands_for_the_papers_values() -> None:
    training = load_recipe("streamline_paper").training
    assert (training.batch_size * training.gradient_accumulation, training.epochs) == (128, 1)
    assert (training.lr, training.min_lr_ratio * 2e-4) == (2e-4, pytest.approx(5e-5))
    changed = load_recipe("streamline", {"preset": "paper_lm", "lr": 1e-4}).training
    assert (changed.objective, changed.lr, changed.betas) == ("lm", 1e-4, (0.9, 0.95))
    with pytest.raises(RecipeError, match="did you mean 'paper_lm'"):
        load_recipe("streamline", {"preset": "paper_ml"})


def test_an_override_of_one_size_replaces_the_other() -> None:
    recipe = load_recipe("streamline", {"n_layers": 3})
    assert (recipe.n_layers, recipe.sparsity) == (3, None)


@pytest.mark.parametrize(
    ("name", "key"),
    [("slicegpt", "parameters.slicing"), ("llm_pruner", "parameters.ratio")],
)
def test_a_methods_own_size_replaces_the_recipes_and_the_other_way_round(
    name: str, key: str
) -> None:
    own = key.partition(".")[2]
    by_ratio = load_recipe(name, {key: "0.3"})
    assert (by_ratio.sparsity, by_ratio.parameters[own]) == (None, 0.3)
    paper = load_recipe(f"{name}_paper")
    assert (paper.sparsity, paper.parameters[own]) == (None, 0.25)
    by_share = load_recipe(f"{name}_paper", {"sparsity": 0.2})
    assert (by_share.sparsity, by_share.parameters.get(own)) == (0.2, None)
    with pytest.raises(RecipeError, match=f"sparsity.*{re.escape(key)}"):
        load_recipe(name, {"sparsity": 0.2, key: 0.3})
    with pytest.raises(RecipeError, match=r"sparsity.*n_layers"):
        load_recipe(name, {"sparsity": 0.2, "n_layers": 3})


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"replacement": "ffn"}, "{'kind': 'ffn'}"),
        ({"training.lr": 1e-3}, "'training'"),
        ({"epochs": 3}, "{'epochs': 3}"),
        ({"preset": "paper_lm"}, "'training'"),
        ({"reference_quirks": "[bidirectional]"}, "'reference_quirks'"),
    ],
)
def test_what_a_method_would_ignore_is_refused(overrides: dict[str, object], part: str) -> None:
    with pytest.raises(RecipeError, match=f"'sleb'.*{re.escape(part)}"):
        load_recipe("sleb", overrides)
    assert load_recipe("sleb", {"replacement": "none"}) == load_recipe("sleb")


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        ("last_layers", {"calibration": "x.txt"}, False),
        ("last_layers", {"seed": 3}, False),
        ("magnitude_l1", {"sequence_length": 64}, False),
        ("shortgpt", {"seed": 3}, False),
        ("streamline_none", {"training.lr": 1}, False),
        ("streamline_none", {"epochs": 2}, False),
        ("streamline_none", {"seed": 3}, False),
        ("streamline_ffn_res", {"replacement.layers": 2}, False),
        ("last_layers_lora", {"recovery.last_layers": 2}, False),
        ("last_layers_lora", {"calibration.samples": 2}, False),
        ("sleb", {"replacement": "none"}, False),
        ("dense", {"n_layers": 2}, False),
        ("last_layers", {"n_layers": 2}, True),
        ("last_layers", {"recovery": "slicegpt", "seed": 3, "recovery.rank": 4}, True),
        ("last_layers", {"recovery": "none"}, True),
        ("random_layers", {"seed": 3}, True),
        ("shortgpt", {"calibration": "x.txt", "calibration.samples": 8}, True),
        ("streamline_none", {"replacement": "ffn", "seed": 3, "lr": 1e-3}, True),
        ("streamline_none", {"calibration": "x.txt", "sequence_length": 64}, True),
    ],
)
def test_what_decides_nothing_in_a_recipe_is_refused(
    name: str, given: dict[str, object], read: bool
) -> None:
    recipe = load_recipe(name, given)
    if read:
        refuse_unread(recipe, given)
    else:
        with pytest.raises(RecipeError, match=rf"'{next(iter(given))}' has no effect.*'{name}'"):
            refuse_unread(recipe, given)
    refuse_unread(recipe, dict.fromkeys(given))


def test_a_method_without_a_seed_does_not_look_at_it() -> None:
    for name in METHODS:
        kind = type(get_method(name))
        own = [each for each in kind.__mro__ if each not in (object, Method)]
        of_training = "training" in kind.reads  # which asks for a replacement
        looks = any("recipe.seed" in inspect.getsource(each) for each in own)
        assert kind.seeded >= (looks and not of_training), name


def test_a_short_key_sets_what_the_method_reads() -> None:
    given = {"calibration": "x.txt", "sequence_length": 64}
    sleb, streamline = (load_recipe(name, given) for name in ("sleb", "streamline"))
    assert (sleb.calibration.source, sleb.calibration.sequence_length) == ("x.txt", 64)
    assert sleb.training == load_recipe("sleb").training
    data = streamline.training.data
    assert (data.source, data.sequence_length) == ("x.txt", 64)


def test_overrides_for_many_recipes_keep_what_one_has_a_use_for() -> None:
    many = {"replacement": "ffn", "training.epochs": 1, "sequence_length": 64, "sparsity": 0.5}
    many |= {"recovery.training.epochs": 1, "lr": 1e-3, "unknown": 1}
    kept = {name: applicable(many, load_recipe(name)).keys() for name in list_recipes()}
    always = {"sequence_length", "sparsity", "unknown"}
    assert kept["sleb"] == always
    assert kept["last_layers_lora"] == always | {"recovery.training.epochs"}
    assert kept["streamline"] == many.keys() - {"recovery.training.epochs"}
    assert "recovery.rank" in applicable(
        {"recovery.rank": 2, "recovery": "slicegpt"}, load_recipe("sleb")
    )


def test_what_overrides_make_untrue_is_not_told() -> None:
    for name, cost in (("last_layers_lora", "no training"), ("llm_pruner_lora", "calibrated")):
        plain, recovered = load_recipe(name, {"recovery": "none"}), load_recipe(name)
        assert (plain.cost, recovered.cost) == (cost, "recovered")
        assert plain.title == f"{recovered.title}; no recovery"
        assert (plain.published, plain.reproduces) == ((), None)
        assert recovered.published
    without = load_recipe("streamline", {"replacement": "none"})
    assert (without.cost, without.published) == ("calibrated", ())
    assert load_recipe("streamline_none", {"replacement": "ffn"}).cost == "recovered"
    assert load_recipe("sleb", {"recovery": "slicegpt"}).cost == "recovered"
    resized = load_recipe("llm_pruner_paper", {"sparsity": 0.3})
    assert (resized.title[-14:], resized.published) == ("; sparsity 0.3", ())
    assert load_recipe("streamline", {"sparsity": 0.3}).published


def test_a_recovery_from_the_command_line() -> None:
    given = {"recovery": "slicegpt", "recovery.targets": "q"}
    recovery = load_recipe("sleb", given).recovery
    assert recovery is not None and recovery.targets == ("q",)
    more = {"recovery.targets": "q,v", "recovery.training.betas": "[0.8, 0.9]"}
    recovery = load_recipe("last_layers_lora", more).recovery
    assert recovery is not None and recovery.targets == ("q", "v")
    assert recovery.training.betas == (0.8, 0.9)
    ends = load_recipe("sleb", {"parameters.protect_first": "null"}).parameters
    assert ends["protect_first"] is None
    with pytest.raises(RecipeError, match=r"recovery\.training\.lr.*recovery=PRESET"):
        load_recipe("sleb", {"recovery.training.lr": "1e-3"})


def test_none_leaves_the_recipe_alone() -> None:
    assert load_recipe("streamline", {"seed": None}) == load_recipe("streamline")


def test_hash_ignores_words_and_sees_numbers() -> None:
    base = load_recipe("streamline")
    renamed = base.model_copy(update={"name": "other", "title": "Other"})
    assert renamed.content_hash() == base.content_hash()
    assert load_recipe("streamline", {"seed": 1}).content_hash() != base.content_hash()
    assert load_recipe("streamline", {"lr": 1e-4}).content_hash() != base.content_hash()


def test_hash_without_a_replacement_ignores_its_training() -> None:
    plain = load_recipe("streamline_none")
    overridden = load_recipe("streamline", {"replacement": "none"})
    assert plain.content_hash() == overridden.content_hash()


def test_a_user_recipe_by_path_takes_its_name_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: streamline\nn_layers: 2\n", encoding="utf-8")
    assert load_recipe(path).name == "mine"


@pytest.mark.parametrize("text", ["- a\n- b\n", "method: [", "\x00"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        load_recipe(path)


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    marker = tmp_path / "ran"
    path.write_text(f"method: !!python/object/apply:os.mkdir ['{marker}']\n", encoding="utf-8")
    with pytest.raises(RecipeError):
        load_recipe(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("foo", "sparsity"),
        ("training.qqqqq", "objective"),
        ("parameters.qqqqq", "metric"),
        ("epoch", "mean 'epochs'"),
        ("training.lrr", "mean 'training.lr'"),
        ("parameters.metrc", "mean 'parameters.metric'"),
    ],
)
def test_an_unknown_key_gets_the_nearest_whole_key_or_all_known_ones(key: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("streamline", {key: 1})
    sentence = str(caught.value)
    assert f"'{key}'" in sentence and hint in sentence
    assert ("known:" in sentence) != ("mean '" in sentence)


def test_an_unknown_recipe_gets_one_suggestion_and_no_list_of_all() -> None:
    with pytest.raises(RecipeError, match=r"'streamlin'.*mean 'streamline'\?") as caught:
        load_recipe("streamlin")
    assert "sleb" not in str(caught.value)


def test_a_recipe_says_what_a_caller_changed(tmp_path: Path) -> None:
    assert load_recipe("laco").overridden == {}
    given = {"calibration.samples": 32, "sparsity": 0.25, "seed": None}
    assert load_recipe("laco", given).overridden == {"calibration.samples": (5, 32)}
    sized = load_recipe("sleb", {"n_layers": 2, "recovery": "slicegpt"}).overridden
    assert sized == {
        "sparsity": (0.25, None), "n_layers": (None, 2), "recovery": (None, "slicegpt"),
    }  # fmt: skip
    preset = load_recipe("streamline", {"preset": "paper_lm"}).overridden
    assert preset["training.objective"] == ("relative_mse", "lm")
    assert not any(key.startswith("training.data") for key in preset)
    mine = tmp_path / "mine.yaml"
    mine.write_text("method: last_layers\nn_layers: 1\nrecovery: {rank: 4}\n")
    completed = load_recipe(mine, {"recovery.kind": "lora"})
    assert completed.overridden == {"recovery.kind": (None, "lora")}
    same = load_recipe("laco", {"calibration.samples": 32})
    again = same.model_copy(update={"overridden": {}})
    assert same.content_hash() == again.content_hash() != load_recipe("laco").content_hash()


def test_an_overridden_value_reaches_log_and_manifest(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="streamline_bench")
    out = compress(
        tiny_llama, load_recipe("magnitude_l1", {"n_layers": 2}), tmp_path / "out", progress=False
    )
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.recipe["overridden"] == {"sparsity": [0.25, None], "n_layers": [None, 2]}
    assert any("n_layers" in record.getMessage() for record in caplog.records)


def test_an_unknown_key_in_a_list_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "method: last_layers\nn_layers: 1\n"
        "published: [{model: m, metric: piqa, value: 1, source: s, sorce: t}]\n"
    )
    with pytest.raises(RecipeError, match=r"'published\.0\.sorce'.*mean 'published\.0\.source"):
        load_recipe(path)
