"""The pytest plugin in somebody else's tests: off, on, failing, and writing its reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.report.build import build_report
from streamline_bench.report.run_file import RunFile, RunRow, write_run_file
from streamline_bench.stability.settings import Settings

pytest_plugins = ["pytester"]

PLUGIN = ("-p", "streamline_bench.pytest_plugin", "-p", "no:cacheprovider")
TEST = """
    def test_keeps(streamline_gate):
        result = streamline_gate({run!r}, draws=200)
        assert result.passed
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin is named on the command line, whether or not it is installed as one."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.fixture(scope="module")
def runs(opencompass_files: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two run folders: in ``bad``, the pruned model lost most of its right answers."""
    made = {}
    for name in ("good", "bad"):
        folder = tmp_path_factory.mktemp(name)
        for seed, label in enumerate(("dense", "pruned")):
            entries = opencompass_files.ppl(120, seed=seed)
            for number, entry in enumerate(entries):
                if number % 3:
                    entry["prediction"] = entry["gold"]
                if name == "bad" and label == "pruned" and number % 2:
                    entry["prediction"] = next(x for x in "ABCD" if x != entry["gold"])
            opencompass_files.write(folder / label, "arc", entries)
        rows = [RunRow(label=label, eval=label) for label in ("dense", "pruned")]
        write_run_file(folder, RunFile(dense="dense", rows=rows))
        build_report(folder, settings=Settings(draws=100), progress=False)
        made[name] = folder
    return made


def test_without_a_reference_it_fails_unless_it_may_skip(
    pytester: pytest.Pytester, runs: dict[str, Path]
) -> None:
    """A forgotten option must not leave CI green."""
    pytester.makepyfile(TEST.format(run=str(runs["good"])))
    result = pytester.runpytest(*PLUGIN)
    result.assert_outcomes(errors=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*--streamline-reference*--streamline-skip*"])
    skipped = pytester.runpytest(*PLUGIN, "--streamline-skip", "-rs")
    skipped.assert_outcomes(skipped=1)
    skipped.stdout.fnmatch_lines(["*--streamline-skip*"])
    skipped.stdout.no_fnmatch_line("*streamline-bench gate*")


def test_a_missing_reference_is_found_before_answers_are_read(
    pytester: pytest.Pytester, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("streamline_bench.gate.evidence.load_samples")
    pytester.makepyfile(TEST.format(run=str(runs["good"])))
    result = pytester.runpytest(*PLUGIN, "--streamline-reference=missing.json")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *SamplesError: *missing.json*"])


def test_passes_and_shows_what_it_found(pytester: pytest.Pytester, runs: dict[str, Path]) -> None:
    pytester.makepyfile(TEST.format(run=str(runs["good"])))
    result = pytester.runpytest(*PLUGIN, f"--streamline-reference={runs['good']}")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*= streamline-bench gate =*", "Gate open: none of *"])


def test_fails_with_what_regressed(pytester: pytest.Pytester, runs: dict[str, Path]) -> None:
    pytester.makepyfile(TEST.format(run=str(runs["bad"])))
    result = pytester.runpytest(*PLUGIN, f"--streamline-reference={runs['good']}")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E *AssertionError: Gate closed: *", "E *pruned, arc: accuracy regressed*"]
    )


def test_writes_the_reference_then_compares(
    pytester: pytest.Pytester, runs: dict[str, Path]
) -> None:
    pytester.makepyfile(TEST.format(run=str(runs["good"])))
    options = (*PLUGIN, "--streamline-reference=ref.json")
    written = pytester.runpytest(*options, "--streamline-write-reference", "-rs")
    written.assert_outcomes(skipped=1)
    written.stdout.fnmatch_lines(["*wrote*ref.json*"])
    assert (pytester.path / "ref.json").is_file()
    pytester.runpytest(*options).assert_outcomes(passed=1)
    pytester.makepyfile(TEST.format(run=str(runs["bad"])))
    pytester.runpytest(*options).assert_outcomes(failed=1)


def test_two_tests_do_not_write_one_reference(
    pytester: pytest.Pytester, runs: dict[str, Path]
) -> None:
    """The second would replace what the first one wrote, and CI would fail later."""
    good, bad = (str(runs[name]) for name in ("good", "bad"))
    tests = [TEST.format(run=run).replace("keeps", f"keeps_{n}") for n, run in
             enumerate((good, good, bad))]  # fmt: skip
    pytester.makepyfile("\n".join(tests))
    written = pytester.runpytest(
        *PLUGIN, "--streamline-reference=ref.json", "--streamline-write-reference"
    )
    written.assert_outcomes(skipped=2, failed=1)
    written.stdout.fnmatch_lines(["E *ComparisonError: *ref.json*"])
    assert good in (pytester.path / "ref.json").read_text()


def test_evaluations_without_a_run_folder(pytester: pytest.Pytester, runs: dict[str, Path]) -> None:
    pytester.makepyfile(
        f"""
        import pytest

        def folders(run):
            return {{label: f"{{run}}/{{label}}" for label in ("dense", "pruned")}}

        def test_good(streamline_gate):
            found = streamline_gate.evaluations(folders({str(runs["good"])!r}), draws=200)
            assert {{check.how for check in found.checks}} == {{"no answer changed"}}

        def test_bad(streamline_gate):
            with pytest.raises(AssertionError, match="Gate closed"):
                streamline_gate.evaluations(folders({str(runs["bad"])!r}), draws=200)

        def test_rows(streamline_gate):
            streamline_gate.evaluations(folders({str(runs["bad"])!r}), rows=["dense"], draws=200)
        """
    )
    result = pytester.runpytest(*PLUGIN, f"--streamline-reference={runs['good']}")
    result.assert_outcomes(passed=3)


def test_thresholds_from_ini_option_and_call(
    pytester: pytest.Pytester, runs: dict[str, Path]
) -> None:
    lenient = "accuracy_margin = 0.9\nstreamline_stability_margin = 0.9"
    pytester.makeini(f"[pytest]\nstreamline_reference = {runs['good']}\nstreamline_{lenient}\n")
    pytester.makepyfile(TEST.format(run=str(runs["bad"])))
    pytester.runpytest(*PLUGIN).assert_outcomes(passed=1)
    pytester.runpytest(*PLUGIN, "--streamline-accuracy-margin=0.01").assert_outcomes(failed=1)
    pytester.makepyfile(TEST.format(run=str(runs["bad"])).replace("200", "200, accuracy=0.01"))
    pytester.runpytest(*PLUGIN).assert_outcomes(failed=1)
    pytester.makepyfile(TEST.format(run=str(runs["bad"])).replace("200", "200, accuracy=7"))
    result = pytester.runpytest(*PLUGIN)
    result.stdout.fnmatch_lines(["E *ComparisonError: Threshold 'accuracy': Input should be *"])


def test_an_import_that_is_light() -> None:
    """Every pytest in an environment with this package imports the plugin."""
    code = (
        "import sys, pytest\nbefore = set(sys.modules)\n"
        "import streamline_bench.pytest_plugin\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(eval(done.stdout))
    assert found <= {"streamline_bench", "streamline_bench.pytest_plugin", "__future__"}


def test_declared_as_a_plugin(repository: Path) -> None:
    declared = (repository / "pyproject.toml").read_text()
    entry = 'streamline_bench = "streamline_bench.pytest_plugin"'
    assert f"[project.entry-points.pytest11]\n{entry}\n" in declared
