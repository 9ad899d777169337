"""pytest plugin: a test fails if a model lost accuracy, stability or speed against a reference.

::

    def test_the_checkpoint_keeps_what_it_had(streamline_gate):
        streamline_gate("runs/nightly")                     # a run folder of streamline-bench

    def test_our_own_evaluation(streamline_gate, outputs):  # folders of lm_eval --log_samples
        streamline_gate.evaluations({"dense": outputs / "dense", "pruned": outputs / "pruned"})

``pytest --streamline-reference reference.json`` names the reference (or ``streamline_reference`` in
the ini file). Without it such a test fails, so that a forgotten option does not leave CI green;
``--streamline-skip`` skips these tests on purpose. ``--streamline-write-reference`` writes the file
instead of comparing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from streamline_bench.gate.evidence import Evidence, Reference, Source
    from streamline_bench.gate.result import GateResult, Thresholds

_THRESHOLDS = {
    "accuracy": ("accuracy-margin", "tolerated drop of accuracy, as a share (0.02)"),
    "stability": ("stability-margin", "tolerated drop of stability, as a share (0.02)"),
    "speed": ("speed-tolerance", "tolerated relative drop of tokens per second (0.05)"),
}
"""Field of ``Thresholds`` -> option (without its prefix) and its help."""

_FLAGS = {
    "skip": "skip the tests that use streamline_gate, instead of failing without a reference",
    "write-reference": "write --streamline-reference from what the tests give, compare nothing",
    "strict": "fail also on checks that cannot tell, or if nothing was compared",
    "across-engines": "compare answers of transformers with those of vLLM",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options and their ini values."""
    group = parser.getgroup("streamline-bench")
    text = "file (or run folder) that the fixture streamline_gate compares with"
    group.addoption("--streamline-reference", metavar="PATH", help=text)
    parser.addini("streamline_reference", text)
    for flag, text in _FLAGS.items():
        group.addoption(f"--streamline-{flag}", action="store_true", help=text)
    for option, text in _THRESHOLDS.values():
        group.addoption(f"--streamline-{option}", type=float, metavar="SHARE", help=text)
        parser.addini(f"streamline_{option.replace('-', '_')}", text)


@dataclass(eq=False)  # a plugin of pytest must be hashable
class StreamlineGate:
    """What the fixture ``streamline_gate`` gives.

    Attributes:
        reference: file or run folder to compare with.
        write: write the reference instead of comparing.
        thresholds: from options and ini file; a call's own keywords count before them.
        across_engines: transformers may have answered one side and vLLM the other.
        results: of all calls, for the summary.
        written: the reference that a test of this session wrote.
    """

    reference: Path
    write: bool = False
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    across_engines: bool = False
    results: list[GateResult] = field(default_factory=list)
    written: Reference | None = None

    def __call__(
        self, run: Path | str, *, rows: Sequence[str] = (), **thresholds: Any
    ) -> GateResult:
        """Fail if ``run`` (a run folder or its leaderboard.json) lost against the reference.

        Args:
            rows: labels to check; by default all of the reference.
            **thresholds: fields of :class:`streamline_bench.gate.result.Thresholds`.

        Raises:
            AssertionError: something regressed or is missing; the message lists it.
            StreamlineBenchError: run or reference cannot be read, or were evaluated differently.
        """
        from streamline_bench.gate.evidence import open_source

        against = self._opened_reference(rows)
        now = open_source(Path(run))
        return self._judge(lambda: now.evidence(progress=False), against, rows, thresholds)

    def evaluations(
        self,
        evaluations: Mapping[str, Path | str],
        *,
        dense: str = "dense",
        throughput: Path | str | None = None,
        rows: Sequence[str] = (),
        **thresholds: Any,
    ) -> GateResult:
        """The same from outputs of lm-eval or OpenCompass, by label.

        Args:
            dense: label of the model that the others were made from.
            throughput: a ``throughput.json`` of ``streamline-bench throughput``, same labels;
                without it, speeds of the reference count as missing.
        """
        from streamline_bench.gate.evidence import read_evaluations

        return self._judge(
            lambda: read_evaluations(evaluations, dense, throughput=throughput, progress=False),
            self._opened_reference(rows),
            rows,
            thresholds,
        )

    def _opened_reference(self, rows: Sequence[str]) -> Source | None:
        """The reference without its answers; None if it is to be written."""
        if self.write:
            return None
        from streamline_bench.gate.evidence import open_source
        from streamline_bench.gate.judge import require_rows

        opened = open_source(self.reference)
        require_rows(opened.figures, rows)
        return opened

    def _judge(
        self,
        read: Callable[[], Evidence],
        against: Source | None,
        rows: Sequence[str],
        thresholds: Mapping[str, Any],
    ) -> GateResult:
        """Everything that is cheap to check was or is checked before ``read`` takes its time."""
        __tracebackhide__ = True
        from streamline_bench.gate.judge import judge
        from streamline_bench.gate.table import line, verdict

        limits = self._limits(thresholds)
        if against is None:
            self._write(read().figures)
            pytest.skip(f"wrote the reference {self.reference}; nothing was compared")
        result = judge(
            read(),
            against.evidence(progress=False),
            limits,
            rows,
            across_engines=self.across_engines,
        )
        self.results.append(result)
        if not result.passed:
            lines = [verdict(result), *(f"  {line(check)}" for check in result.closing)]
            raise AssertionError("\n".join(lines))
        return result

    def _write(self, figures: Reference) -> None:
        """Write the reference; another one in the same session would take its place unseen."""
        from streamline_bench.errors import ComparisonError
        from streamline_bench.gate.evidence import write_reference

        if self.written is not None and self.written != figures:
            raise ComparisonError(
                f"Another test wrote {self.reference} from {self.written.source}, and one file "
                "holds one reference; write them one by one: choose the test with -k, and give "
                "each a --streamline-reference of its own."
            )
        write_reference(figures, self.reference)
        self.written = figures

    def _limits(self, own: Mapping[str, Any]) -> Thresholds:
        from pydantic import ValidationError

        from streamline_bench.core.recipe.validation import first_problem
        from streamline_bench.errors import ComparisonError
        from streamline_bench.gate.result import Thresholds

        try:
            return Thresholds(**{**self.thresholds, **own})
        except ValidationError as error:
            raise ComparisonError(f"Threshold {first_problem(error)}.") from None

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print a line per gate and per check that is not ok, if the fixture was used."""
        if not self.results:
            return
        from streamline_bench.gate.table import line, ordered, verdict

        terminalreporter.section("streamline-bench gate")
        for result in self.results:
            terminalreporter.write_line(verdict(result))
            for check in ordered(result):
                if check.status != "ok":
                    terminalreporter.write_line(f"  {line(check)}")


@pytest.fixture(scope="session")
def streamline_gate(request: pytest.FixtureRequest) -> StreamlineGate:
    """Compare models with the reference of ``--streamline-reference``; fails without one."""
    config = request.config
    given = config.getoption("--streamline-reference")
    configured = config.getini("streamline_reference")
    if config.getoption("--streamline-skip"):
        pytest.skip("--streamline-skip was given")
    if not given and not configured:
        pytest.fail(
            "The fixture streamline_gate has no reference to compare with; run pytest with "
            "--streamline-reference PATH, or with --streamline-skip to skip such tests.",
            pytrace=False,
        )
    # A path of the ini file is relative to it, one of the command line to the current folder.
    reference = Path(given) if given else config.rootpath / configured
    gate = StreamlineGate(
        reference,
        write=bool(config.getoption("--streamline-write-reference")),
        thresholds=_thresholds(config),
        across_engines=bool(config.getoption("--streamline-across-engines")),
    )
    config.pluginmanager.register(gate, "streamline-bench-summary")
    return gate


def _thresholds(config: pytest.Config) -> dict[str, Any]:
    found: dict[str, Any] = {"strict": bool(config.getoption("--streamline-strict"))}
    for name, (option, _) in _THRESHOLDS.items():
        given = config.getoption(f"--streamline-{option}")
        value = (
            given if given is not None else config.getini(f"streamline_{option.replace('-', '_')}")
        )
        if value not in (None, ""):
            found[name] = value
    return found
