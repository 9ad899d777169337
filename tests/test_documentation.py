"""The documentation stays true: commands parse, recipes exist, links and names resolve."""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from streamline_bench.core.recipe.schema import TrainingSpec
from streamline_bench.harness.scoring.scorer import LOGITS_PER_BATCH

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "reports" / "docs" / "pages"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
EXAMPLE = ROOT / "tests" / "example_method"
RECIPES = {
    path.stem for path in (*(ROOT / "baselines").glob("*.yaml"), *EXAMPLE.rglob("recipes/*.yaml"))
}
GROUPS = {"all", "no-training"}
TOOLS = ("streamline-bench", "lm_eval", "accelerate")


def blocks(page: Path, language: str) -> Iterator[str]:
    """Yield the code blocks of a language, dedented."""
    pattern = rf"^( *)```{language}\n(.*?)^\1```"
    for indent, code in re.findall(pattern, page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        yield re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Yield (page, words) of every command of ours or of the harness that a page shows."""
    for page in PAGES:
        shell = blocks(page, "bash")
        steps = (step for code in blocks(page, "yaml") for step in re.findall(r"- run: (.*)", code))
        for code in itertools.chain(shell, steps):
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] in TOOLS:
                    yield str(page.relative_to(ROOT)), words


COMMANDS = list(command_lines())


def parse_ours(words: list[str]) -> click.Context:
    """Parse a command line without running it; callbacks that look at the machine are left out."""
    from streamline_bench.cli.main import cli

    # A copy: the command itself keeps its callbacks for other tests.
    command = copy.copy(cli.get_command(click.Context(cli), words[1]))
    assert command is not None, f"no command {words[1]}"
    command.params = [copy.copy(option) for option in command.params]
    for option in command.params:
        if option.name == "device":
            option.callback = None
    return command.make_context(words[1], words[2:])


def parse_harness(words: list[str]) -> argparse.Namespace:
    """Parse with the harness's own parser."""
    from lm_eval._cli import HarnessCLI

    return HarnessCLI()._parser.parse_args(words)


def test_the_pages_show_commands() -> None:
    assert len(COMMANDS) > 30
    assert {words[1] for _, words in COMMANDS if words[0] == "streamline-bench"} >= {
        "compare", "compress", "scan", "stability", "throughput", "gate", "opencompass", "report",
    }  # fmt: skip


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: str(value)[:60])
def test_commands_parse(page: str, words: list[str]) -> None:
    if "streamline_bench" in words:  # by a launcher
        words = ["streamline-bench", *words[words.index("streamline_bench") + 1 :]]
    if words[:2] == ["streamline-bench", "lm-eval"]:
        check_model(vars(parse_harness(words[2:])))
    elif words[0] == "streamline-bench":
        parameters = parse_ours(words).params
        check_recipes((parameters.get("recipes") or "").split(","))
        named = [row.split("=")[1].split(":")[0] for row in parameters.get("rows") or ()]
        check_recipes([name for name in named if "/" not in name])  # others are checkpoints
        check_recipes([parameters.get("recipe") or ""])
    else:
        check_model(vars(parse_harness(words[words.index("lm_eval") + 1 :])))


def check_model(parsed: dict[str, object]) -> None:
    """The model's class and arguments are ones that exist."""
    assert parsed["model"] in {"streamline", "streamline-vllm"}
    arguments = parsed["model_args"]
    assert isinstance(arguments, dict)
    check_recipes([str(arguments.get("recipe", ""))])


def check_recipes(names: list[str]) -> None:
    unknown = [name for name in names if name and name not in RECIPES | GROUPS]
    assert not unknown, f"no recipe {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.*)", found.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_compile_and_import_what_exists(page: Path) -> None:
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("streamline_b"):
                module = importlib.import_module(str(node.module))
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, f"{node.module} has no {missing}"


def test_names_of_the_api_reference_exist() -> None:
    text = (DOCS / "reference" / "api.md").read_text("utf-8")
    names = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    assert len(names) > 15
    for name in names:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute, None)
        assert found is not None or importlib.import_module(name), name


def test_plans_and_tasks_in_yaml_are_mappings() -> None:
    for page in PAGES:
        for code in blocks(page, "yaml"):
            loaded = yaml.safe_load(code)
            assert isinstance(loaded, dict | list), page
            if isinstance(loaded, dict):
                check_recipes([name for name in loaded.get("recipes", []) if isinstance(name, str)])


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text("utf-8"))
    listed = set(re.findall(r"[\w/-]+\.md", str(config["nav"])))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_the_limits_of_speed_are_what_their_code_computes() -> None:
    page = DOCS / "reference" / "limits.md"
    (code,), text = blocks(page, "python"), " ".join(page.read_text("utf-8").split())
    computed: dict[str, Any] = {}
    exec(code, computed)
    assert computed["PARAMETERS"] == 8_030_261_248  # as published
    for job, (flops, moved, seconds) in computed["JOBS"].items():
        assert f"| {job} | {flops / 1e12:,.0f} | {moved / 1e9:,.0f} | {seconds:.2f} |" in text
    for loss, seconds in computed["LOSSES"].items():
        assert f"| {loss} | {seconds:.3f} |" in text
    for said in computed["SAID"].values():
        assert said in text.split("```")[-1], said
    training = yaml.safe_load((ROOT / "baselines" / "streamline.yaml").read_text("utf-8"))
    assert training["training"]["data"]["samples"] == 30000
    assert (TrainingSpec().batch_size, TrainingSpec().autocast) == (8, "auto")
    assert computed["batch_rows"] == LOGITS_PER_BATCH // computed["V"] // 80


def test_named_environment_variables_are_read_somewhere() -> None:
    source = "".join(
        path.read_text("utf-8")
        for folder in ("streamline_bench", "tasks", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if path != Path(__file__)
    )
    for page in PAGES:
        for name in set(re.findall(r"STREAMLINE_BENCH_[A-Z]+", page.read_text("utf-8"))):
            assert name in source, f"{page.name}: {name}"
