"""Methods of other packages: found by entry point or as module:Class, checked before they run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streamline_bench.compression import pipeline, recipes
from streamline_bench.compression.recipes import list_recipes, load_recipe
from streamline_bench.core.training import trainer
from streamline_bench.errors import RecipeError
from streamline_bench.methods import base
from streamline_bench.methods.base import METHODS, get_method, method_facts
from streamline_bench.methods.recovery import recover
from streamline_bench.modeling.loading import SourceModel

SOURCE = """
from streamline_bench.methods.base import Compressed, Method
from streamline_bench.methods.depth.sleb import SLEB

class Good(Method):
    name = "good"
    api = 1
    version = 3
    def compress(self, work):
        raise NotImplementedError

class Silent(SLEB):
    name = "silent"

class Newer(Good):
    api = 2

class Abstract(Method):
    name = "abstract"
    api = 1
"""

Offer = Callable[..., None]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Offer]:
    """Return a function that makes a package offer methods and recipes, as an installation does."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "stranger.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("1 / 0\n")

    def make(package: str, methods: dict[str, str], texts: dict[str, str] | None = None) -> None:
        info = tmp_path / f"{package}-0.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.5\n")
        lines = ["[streamline_bench.methods]", *(f"{k} = {v}" for k, v in methods.items())]
        if texts is not None:
            lines += ["[streamline_bench.recipes]", f"{package} = {package}_recipes"]
            folder = tmp_path / f"{package}_recipes"
            folder.mkdir()
            for name, text in texts.items():
                (folder / f"{name}.yaml").write_text(text)
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        _forget()

    yield make
    _forget()
    sys.modules.pop("stranger", None)


def _forget() -> None:
    importlib.invalidate_caches()
    base.offered.cache_clear()
    recipes._offered_recipes.cache_clear()


def test_every_method_of_ours_keeps_to_the_contract() -> None:
    for name in METHODS:
        method = get_method(name)
        assert (method.name, method.api) == (name, base.API_VERSION)
        assert method.version >= 1


def test_a_method_of_another_package_is_found_by_its_name(offer: Offer) -> None:
    offer("outer", {"good": "stranger:Good"})
    assert type(get_method("good")).__name__ == "Good"
    facts = method_facts("good")
    assert (facts["package"], facts["package_version"], facts["version"]) == ("outer", "0.5", 3)
    assert method_facts("stranger:Good")["source_sha256"] == facts["source_sha256"]
    with pytest.raises(RecipeError, match=r"'goood'.*'good'"):
        get_method("goood")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("stranger:Missing", ("'Missing'", "derives from")),
        ("stranger:SOURCE", ("'SOURCE'", "derives from")),
        ("stranger:Abstract", ("'Abstract'", "compress")),
        ("stranger:Silent", ("no version", "api")),
        ("stranger:Newer", ("version 2", "install")),
        ("broken:Class", ("ZeroDivisionError", "broken")),
        ("absent.module:Class", ("ModuleNotFoundError", "absent")),
    ],
)
def test_what_cannot_be_used_is_one_sentence(
    method: str, words: tuple[str, ...], offer: Offer, tmp_path: Path
) -> None:
    offer("outer", {})
    path = tmp_path / "mine.yaml"
    path.write_text(f"method: {method}\nn_layers: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    for word in (f"'{method}'", *words):
        assert word in str(caught.value)


def test_two_packages_with_one_name_are_both_named(offer: Offer) -> None:
    text = "method: stranger:Good\nn_layers: 1\n"
    offer("outer", {"good": "stranger:Good"}, {"theirs": text})
    offer("inner", {"good": "stranger:Newer"}, {"theirs": text})
    with pytest.raises(RecipeError, match=r"(?s)inner.*outer|outer.*inner"):
        get_method("good")
    with pytest.raises(RecipeError, match=r"(?s)inner.*outer|outer.*inner"):
        load_recipe("theirs")


def test_our_names_come_first_and_a_package_that_takes_one_is_told(
    offer: Offer, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = "method: sleb\nn_layers: 1\n"
    offer("outer", {"sleb": "stranger:Good"}, {"theirs": recipe, "sleb": recipe})
    assert type(get_method("sleb")).__name__ == "SLEB"
    assert load_recipe("sleb").sparsity == 0.25
    assert "outer" in caplog.text
    assert "theirs" in list_recipes() and "theirs" not in list_recipes(built_in=True)
    with pytest.raises(RecipeError, match=r"(?s)'theirs'.*outer.*stranger:Good"):
        load_recipe("theirs")


def test_recipes_that_cannot_be_read_are_named_and_left_out(
    offer: Offer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    offer("outer", {}, {})
    (tmp_path / "outer-0.5.dist-info" / "entry_points.txt").write_text(
        "[streamline_bench.recipes]\nouter = broken.recipes\n"
    )
    _forget()
    assert "sleb" in list_recipes()
    assert "outer" in caplog.text


def test_versions_and_an_edited_source_change_the_key(
    offer: Offer, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer("outer", {"good": "stranger:Good"}, {"theirs": "method: good\nn_layers: 1\n"})
    theirs, ours = load_recipe("theirs"), load_recipe("streamline", {"recovery": "slicegpt"})

    def keys() -> tuple[str, str]:
        source = SourceModel.find(tiny_llama)
        return pipeline.content_key(source, theirs), pipeline.content_key(source, ours)

    first = keys()
    assert keys() == first
    (tmp_path / "stranger.py").write_text(SOURCE + "# edited\n")
    edited = keys()
    assert edited[0] != first[0] and edited[1] == first[1]
    monkeypatch.setattr(type(get_method("good")), "version", 4)
    assert keys()[0] not in (edited[0], first[0])
    homes = {
        "TRAINING_VERSION": trainer,
        "RECOVERY_VERSION": recover,
        "SHARED_VERSION": pipeline,
    }
    for name, home in homes.items():
        with monkeypatch.context() as patch:
            patch.setattr(home, name, 99)
            assert keys()[1] != first[1]
