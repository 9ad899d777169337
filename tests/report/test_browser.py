"""The page in a real browser: it sorts, filters, opens, and shows hostile strings as text."""

from __future__ import annotations

import copy
import importlib.util
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from streamline_bench.report.build import build_leaderboard
from streamline_bench.report.leaderboard import Leaderboard, read_leaderboard
from streamline_bench.report.run_file import NoiseRun, RunFile, RunRow, read_run_file
from streamline_bench.report.standing import TaskAnswers, standing
from streamline_bench.report.views.page import to_html
from streamline_bench.stability.settings import Settings

valid = Leaderboard.model_validate

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed (tox -e report installs it)"
)

HOSTILE = (
    "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'> "
    "=HYPERLINK(1) | a | \x1b[31mred \u202eleft \"' {{ 7*7 }} </style>"
)


def _setup(repository: Path, name: str = "browser_setup") -> Any:
    path = repository / "tests" / "report" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        yield playwright


@pytest.fixture
def browser(driver: Any, repository: Path) -> Iterator[Any]:
    """A browser of its own for every test: one that dies takes no other test with it."""
    setup = _setup(repository)
    executable = setup.chromium()
    if executable is None:
        pytest.skip("there is no chromium (python tests/report/browser_setup.py installs it)")
    running = driver.chromium.launch(executable_path=executable, args=list(setup.FLAGS))
    yield running
    running.close()


@pytest.fixture(scope="module")
def board(
    make_run: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Dense, two compressed models of different cost with throughput, and one that failed."""
    run = make_run(tmp_path_factory.mktemp("run"))
    recipes = {
        "none": {"title": "No replacement", "method": "streamline", "cost": "calibrated"},
        "layer": {
            "title": "One layer", "method": "streamline", "cost": "recovered",
            "published": [{"model": "Llama-2-7B", "metric": "Colours", "value": 61.07,
                           "sparsity": 0.24, "source": "a paper"}],
        },
    }  # fmt: skip
    dense, none, layer = (
        row.model_copy(update={"recipe": recipes.get(row.label)}) for row in read_run_file(run).rows
    )
    lost = RunRow(label="lost", failed="No threshold reaches 25 %.",
                  recipe={"method": "laco", "cost": "no training"})  # fmt: skip
    noise = [NoiseRun(label="batch size 1", eval="dense/eval")]
    given = RunFile(dense="dense", rows=[dense, none, lost, layer], noise=noise)
    board = build_leaderboard(given, run, settings=Settings(draws=100), progress=False)
    made = board.model_dump(mode="json")
    for row, speed in zip(made["rows"], (100.0, 128.5, None, 121.0), strict=True):
        if speed:
            row["throughput"] = {
                "status": "ok", "engine": "vllm 0.29", "device": "a GPU", "dtype": "bfloat16",
                "batch_size": 16, "output_tokens_per_second": speed, "ratio": speed / 100,
                "ratio_low": speed / 104, "ratio_high": speed / 96,
            }  # fmt: skip
    return Leaderboard.model_validate(made).model_dump(mode="json")


def many_rows() -> dict[str, Any]:
    """The committed board of 34 rows, its rows tested against each other on made-up answers."""
    root = Path(__file__).resolve().parents[2]
    board = read_leaderboard(root / "reports" / "bundled-quarter" / "leaderboard.json")
    hard = np.random.default_rng(0).random(300)
    answers = {}
    for seed, row in enumerate(board.rows):
        if row.accuracy_macro and not row.is_dense:
            noise = np.random.default_rng(seed).normal(0, 0.1, 300)
            right = hard + noise < row.accuracy_macro.value
            names = tuple(map(str, range(300)))
            answers[row.label] = {"task": TaskAnswers(names, right, hard < 0.9, None, None)}
    found = standing(board.rows, answers, Settings(draws=100))
    return board.model_copy(
        update={name: getattr(found, name) for name in ("ranks", "neighbours", "contests")}
    ).model_dump(mode="json")


class Visit:
    """A page that was opened, with everything it asked for and complained about."""

    def __init__(self, page: Any, path: Path) -> None:
        self.page, self.path = page, path
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append("dialog"), dialog.dismiss()))
        page.goto(path.as_uri())

    def labels(self, table: str = "table.board") -> list[str]:
        return [
            row.get_attribute("data-label")
            for row in self.page.locator(f"{table} tbody tr").all()
            if row.is_visible()
        ]

    def head(self, title: str) -> Any:
        return self.page.locator("table.board thead th", has_text=title)

    def opened(self) -> None:
        self.page.evaluate("document.querySelectorAll('details').forEach((d) => d.open = true)")


@pytest.fixture
def visit(browser: Any, board: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., Visit]]:
    """Open a leaderboard; at the end the page must have been silent and asked for nothing."""
    contexts, visits = [], []

    def open_page(shown: dict[str, Any] = board, **options: Any) -> Visit:
        path = tmp_path / f"leaderboard-{len(visits)}.html"
        path.write_text(to_html(valid(shown)), encoding="utf-8")
        contexts.append(browser.new_context(reduced_motion="reduce", **options))
        visits.append(Visit(contexts[-1].new_page(), path))
        return visits[-1]

    yield open_page
    for one in visits:
        assert one.complaints == []
        assert {url for url in one.requests if not url.startswith("data:")} == {one.path.as_uri()}
    for context in contexts:
        context.close()


def test_headings_sort_by_mouse_and_keyboard(visit: Callable[..., Visit]) -> None:
    seen = visit()
    assert seen.labels() == ["dense", "layer", "none", "lost"], "by accuracy, the failed row last"
    assert seen.head("Accuracy").get_attribute("aria-sort") == "descending"
    seen.head("Speed").get_by_role("button").click()
    assert seen.labels() == ["none", "layer", "dense", "lost"]
    assert seen.head("Speed").get_attribute("aria-sort") == "descending"
    assert seen.head("Accuracy").get_attribute("aria-sort") == "none"
    seen.head("Speed").get_by_role("button").focus()
    seen.page.keyboard.press("Enter")
    assert seen.labels() == ["dense", "layer", "none", "lost"]
    assert seen.head("Speed").get_attribute("aria-sort") == "ascending"
    seen.head("Model").get_by_role("button").focus()
    seen.page.keyboard.press("Space")
    assert seen.labels() == ["dense", "layer", "none", "lost"], "text: A to Z first"
    seen.head("Stability").get_by_role("button").click()
    assert seen.labels()[-2:] == ["dense", "lost"], "no value comes last, failed after that"


def test_filtering_hides_a_model_everywhere(visit: Callable[..., Visit]) -> None:
    seen = visit()
    page = seen.page
    assert page.locator("#shown").inner_text() == "3 of 3 compressed models"
    page.get_by_label("Filter models").fill("one LAYER")
    assert seen.labels() == ["dense", "layer"]
    assert page.locator("#shown").inner_text() == "1 of 3 compressed models"
    for part in ("table.forest tbody tr", "table.heat tbody tr", "svg.pareto g", "details.model"):
        texts = [one.text_content() for one in page.locator(part).all() if one.is_visible()]
        assert any("layer" in text for text in texts), part
        assert not any("none" in text.split(":")[0] for text in texts), part
    figures = page.locator("#inside figure")
    assert [one.is_visible() for one in figures.all()] == [True, True, False], (
        "the shared matrix stays while one of its models is shown, the other's curve goes"
    )
    assert page.locator("#inside .names").inner_text() == "layer"
    page.get_by_label("Filter models").fill("nothing like it")
    assert not any(one.is_visible() for one in figures.all())
    assert seen.labels() == ["dense"] and page.locator("#nothing").is_visible()
    page.get_by_role("button", name="Show all").click()
    assert len(seen.labels()) == 4
    assert page.evaluate("document.activeElement.id") == "filter"
    for name, left in (("Recovered", "layer"), ("Calibrated", "none"), ("No training", "lost")):
        page.get_by_role("button", name=name).click()
        assert seen.labels() == ["dense", left]
        assert page.get_by_role("button", name=name).get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="All", exact=True).click()
    assert len(seen.labels()) == 4 and all(one.is_visible() for one in figures.all())
    assert [one.is_visible() for one in page.locator("#inside .names li").all()] == [True] * 2


def test_a_board_of_sizes_shows_one_of_them_and_makes_a_picture_of_curves(
    visit: Callable[..., Visit], sized: dict[str, Any], repository: Path
) -> None:
    seen = visit(sized)
    page = seen.page
    page.get_by_role("button", name="50 %", exact=True).click()
    assert seen.labels() == ["dense", "slice-0.5", "map-0.5", "none-0.5"]
    page.get_by_label("Filter models").fill("map")
    assert seen.labels() == ["dense", "map-0.5"]
    page.get_by_role("button", name="All sizes").click()
    assert seen.labels() == ["dense", "map-0.25", "map-0.5"]
    assert _setup(repository, "reference").only_curves(page)
    shown = [one for one in page.locator("figure, table, h1").all() if one.is_visible()]
    assert [one.get_attribute("data-name") for one in shown] == [
        None, "curve-accuracy-against-parameters", "curve-token-KL-against-parameters",
    ]  # fmt: skip


def test_a_flip_opens_by_mouse_and_by_keyboard(
    visit: Callable[..., Visit], board: dict[str, Any]
) -> None:
    page = visit().page
    flips = page.locator("details.model").first.locator("details.flip")
    row = next(row for row in board["rows"] if row["label"] == "layer")
    assert flips.count() == len(row["worst_flips"])
    first, flip = flips.nth(0), row["worst_flips"][0]
    assert not first.locator(".prompt").is_visible()
    first.locator("summary").click()
    assert first.locator(".prompt").inner_text() == flip["prompt"]
    lines = first.locator("tbody tr").all_inner_texts()
    assert len(lines) == len(flip["choices"])
    for index, line in enumerate(lines):
        assert flip["choices"][index] in line
        assert f"{100 * flip['dense_shares'][index]:.1f} %" in line
        assert f"{100 * flip['pruned_shares'][index]:.1f} %" in line
        assert ("right" in line) == (index == flip["gold"])
        chosen = (flip["dense_choice"], flip["pruned_choice"]).count(index)
        assert line.count("chosen") == chosen
    second = flips.nth(1)
    second.locator("summary").focus()
    page.keyboard.press("Enter")
    assert second.locator(".prompt").is_visible()
    page.keyboard.press("Enter")
    assert not second.locator(".prompt").is_visible()


def test_the_tasks_table_changes_by_keyboard(visit: Callable[..., Visit]) -> None:
    page = visit().page
    cell = page.locator("table.heat tbody tr").nth(1).locator("td").first
    shown = [cell.inner_text()]
    page.get_by_label("Accuracy", exact=True).focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        shown.append(cell.inner_text())
    assert len(set(shown)) == 4 and page.get_by_label("Agreement", exact=True).is_checked()


def test_a_models_name_leads_to_how_it_was_made(visit: Callable[..., Visit]) -> None:
    page = visit().page
    page.locator("table.board a.name", has_text="layer").click()
    made = page.locator("details.row", has=page.locator("summary", has_text="One layer"))
    assert made.get_attribute("open") is not None
    assert made.locator("dl.facts").is_visible() and "ab" * 32 in made.inner_text()


def test_failed_row_noise_and_literature_are_shown(
    visit: Callable[..., Visit], board: dict[str, Any]
) -> None:
    page = visit().page
    assert "No threshold reaches 25 %." in page.locator("tr.failed").inner_text()
    assert "batch size 1" in page.locator("#statistics").inner_text()
    assert not page.locator("#literature table").is_visible(), "numbers of another model are folded"
    page.locator("#literature summary").click()
    line = page.locator("#literature tbody tr").inner_text()
    assert "Llama-2-7B" in line and "61.07 %" in line and "a paper" in line
    row = next(row for row in board["rows"] if row["label"] == "layer")
    colours = next(task for task in row["tasks"] if task["task"] == "colours")
    ours = page.locator("#literature td.ours").inner_text()
    assert f"{100 * colours['accuracy']['value']:.1f}" in ours and "colours" in ours
    assert "measured speed" in page.locator("#tradeoff").inner_text()


def test_hostile_strings_are_text(
    visit: Callable[..., Visit],
    board: dict[str, Any],
    parts_named: Callable[[str], dict[str, Any]],
) -> None:
    made = copy.deepcopy(board)
    made["noise"]["repeats"] = [f"noise {HOSTILE}"]
    made["failed_jobs"] = {HOSTILE: HOSTILE}
    made["title"] = made["commands"] = HOSTILE
    made["commands"] = [HOSTILE]
    for row in made["rows"]:
        row["title"] = HOSTILE
        if row["macro"]:
            row |= parts_named(HOSTILE)
        row["label"] = made["dense"] = f"{row['label']}{HOSTILE}" if row["is_dense"] else HOSTILE
        for flip in row["worst_flips"]:
            flip["prompt"] = flip["target"] = HOSTILE
            if flip["choices"]:
                flip["choices"] = [HOSTILE for _ in flip["choices"]]
        for published in row["published"]:
            published["source"] = published["metric"] = published["unit"] = HOSTILE
        for task in row["tasks"]:
            task["task"] = HOSTILE if task["task"] == "colours" else task["task"]
        row["failed"] = HOSTILE if row["failed"] else None
    made["dense"] = next(row["label"] for row in made["rows"] if row["is_dense"])
    seen = visit(Leaderboard.model_validate(made).model_dump(mode="json"))
    seen.opened()
    assert seen.page.evaluate("window.pwned") is None
    assert seen.page.locator("script").count() == 1 and seen.page.locator("img").count() == 0
    shown = seen.page.locator("h1").inner_text()
    assert "<script>window.pwned = 1</script>" in shown and "{{ 7*7 }}" in shown
    text = seen.page.locator("body").inner_text()
    for name in ("noise", "group", "perplexity", "generation"):
        assert f"{name} </script><script>window.pwned = 1" in text, name
    assert "\x1b" not in text and "\u202e" not in text
    seen.head("Change").get_by_role("button").click()
    seen.page.get_by_label("Filter models").fill("<script>")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_only_inside(visit: Callable[..., Visit], scheme: str) -> None:
    seen = visit(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    seen.opened()
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert seen.page.evaluate("document.querySelector('.scroll').scrollWidth") > 360
    sticky = seen.page.locator("table.board tbody th").first
    seen.page.evaluate("document.querySelector('.scroll').scrollLeft = 200")
    assert sticky.bounding_box()["x"] >= 0, "the model's name stays in sight"


CONTRAST = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = channels(getComputedStyle(document.body).backgroundColor);
  const ratios = {};
  for (const selector of ["body", ".lede", ".note", ".ci", ".brand", ".tag.recovered",
                          ".tag.calibrated", ".tag.failed", ".decision", "figcaption", ".drop"]) {
    const ink = channels(getComputedStyle(document.querySelector(selector)).color);
    const [a, b] = [luminance(ink), luminance(paper)];
    ratios[selector] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return { paper: luminance(paper), ratios };
}"""


def test_light_and_dark_have_contrast(visit: Callable[..., Visit]) -> None:
    found = {
        scheme: visit(color_scheme=scheme).page.evaluate(CONTRAST) for scheme in ("light", "dark")
    }
    assert found["light"]["paper"] > 0.9 and found["dark"]["paper"] < 0.05
    for scheme, measured in found.items():
        low = {name: ratio for name, ratio in measured["ratios"].items() if ratio < 4.5}
        assert low == {}, f"{scheme}: contrast below 4.5"


def test_print_fits_the_page_and_leaves_out_the_controls(visit: Callable[..., Visit]) -> None:
    page = visit(viewport={"width": 1032, "height": 700}).page
    page.emulate_media(media="print", color_scheme="dark")
    for part in (".tools", ".switch", "nav"):
        assert not page.locator(part).is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1032
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


@pytest.mark.parametrize("large", ["34 rows of one size", "53 rows of four sizes"])
def test_a_large_board_is_a_paper_of_at_most_twelve_pages(
    visit: Callable[..., Visit], repository: Path, large: str
) -> None:
    """Each row has its recipe, flips, tasks and tests against the others."""
    sizes = repository / "reports" / "smollm2-sizes" / "leaderboard.json"
    board = many_rows() if "one" in large else read_leaderboard(sizes).model_dump(mode="json")
    page = visit(board).page
    printed = page.pdf(prefer_css_page_size=True)
    assert len(re.findall(rb"/Type /Page\b", printed)) <= 12
    page.emulate_media(media="print")
    for part in ("#leaderboard table", "#tradeoff svg", "#between table", "#tasks table.heat"):
        assert page.locator(part).first.is_visible(), part
    for part in ("#flips", "#made details", "#literature"):
        assert not page.locator(part).first.is_visible(), part
    split = page.evaluate(
        """() => [...document.querySelectorAll("table.board .name")].filter((name) =>
          getComputedStyle(name).overflowWrap !== "normal").length"""
    )
    assert split == 0, "names break between their parts only"


@pytest.mark.parametrize("kind", ["SVG", "PNG"])
def test_a_figure_is_saved_with_its_styles(visit: Callable[..., Visit], kind: str) -> None:
    page = visit(color_scheme="light").page
    with page.expect_download() as found:
        page.locator("#tradeoff").get_by_role("button", name=f"Save as {kind}").first.click()
    content = Path(found.value.path()).read_bytes()
    assert found.value.suggested_filename == f"accuracy-against-ratio.{kind.lower()}"
    if kind == "PNG":
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG") and (width, height) == (2000, 800)
        return
    root = ElementTree.fromstring(content)
    shape = next(one for one in root.iter() if one.get("class") == "shape")
    assert "fill:rgb(" in shape.get("style").replace(" ", "")
    assert next(root.iter("{http://www.w3.org/2000/svg}rect")).get("fill") == "rgb(255, 255, 255)"


def test_keyboard_and_screen_reader(visit: Callable[..., Visit]) -> None:
    seen = visit()
    page = seen.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["y"] >= 0, "seen once it has the focus"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#leaderboard"
    page.get_by_label("Filter models").focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, a, [role=img], [role=region]")]
          .filter((one) => !(one.textContent.trim() || one.getAttribute("aria-label")
            || one.getAttribute("aria-labelledby") || one.labels?.length)).length"""
    )
    assert unnamed == 0
    headings = page.evaluate(
        """() => [...document.querySelectorAll("table")].filter((table) =>
          [...table.querySelectorAll("thead th:not([aria-hidden]), tbody th")]
            .some((head) => !head.scope)).length"""
    )
    assert headings == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))
    scrolling = page.locator(".scroll").all()
    assert all(one.get_attribute("tabindex") == "0" for one in scrolling)


def test_matrix_and_curve_speak(visit: Callable[..., Visit]) -> None:
    page = visit().page
    matrix = page.locator("svg.matrix").first
    assert matrix.get_attribute("role") == "img"
    assert "removed: block of 3 layers, layers 6 to 8" in matrix.get_attribute("aria-label")
    spoken = page.locator("svg.curve").first.get_attribute("aria-label")
    assert all(word in spoken for word in ("first", "best", "last", "validation loss"))


def test_committed_pages_open_silently(browser: Any, repository: Path) -> None:
    pages = sorted((repository / "reports").glob("*/leaderboard.html"))
    assert pages
    for path in pages:
        context = browser.new_context(reduced_motion="reduce")
        seen = Visit(context.new_page(), path)
        assert seen.labels()
        seen.opened()
        seen.page.get_by_label("Filter models").fill("streamline")
        assert seen.page.locator("#shown").inner_text().split()[0] != "0"
        assert seen.complaints == [], path.parent.name
        asked = {url for url in seen.requests if not url.startswith("data:")}
        assert asked == {path.as_uri()}, path.parent.name
        context.close()
