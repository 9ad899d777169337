"""``streamline-bench stability``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamline_bench.cli.options import print_table

if TYPE_CHECKING:
    from rich.table import Table

    from streamline_bench.stability.comparison import (
        Comparison,
        Estimate,
        GenerationComparison,
        GroupComparison,
        Overall,
        PerplexityComparison,
        TaskComparison,
    )
    from streamline_bench.stability.samples import Samples

QUANTITIES = ["nll_per_byte", "nll_per_char", "nll", "ppl_per_byte", "ppl_per_char",
              "mean_token_nll"]  # fmt: skip


@click.command("stability")
@click.argument("dense", type=click.Path(path_type=Path))
@click.argument("pruned", type=click.Path(path_type=Path))
@click.option("--task", "tasks", multiple=True, help="Compare only this task or group.")
@click.option("--common", is_flag=True, help="Compare the tasks that both runs have.")
@click.option(
    "--mode",
    type=click.Choice(["paper", "reference_script"]),
    default="paper",
    show_default=True,
    help="The paper's equation, or its script's arithmetic.",
)
@click.option(
    "--quantity",
    type=click.Choice(QUANTITIES),
    help="What stands for the perplexity of a choice; by default what the engine records: "
    "mean_token_nll with OpenCompass, nll_per_byte with lm-eval.",
)
@click.option("--ddof", type=click.IntRange(0, 1), default=1, show_default=True)
@click.option(
    "--verdict",
    type=click.Choice(["acc", "acc_norm"]),
    default="acc",
    show_default=True,
    help="'acc' stands for the task's own verdict, exact_match included.",
)
@click.option("--confidence", type=click.FloatRange(0.5, 0.9999), default=0.95, show_default=True)
@click.option("--draws", type=click.IntRange(min=100), default=10_000, show_default=True)
@click.option(
    "--margin",
    type=click.FloatRange(0, 1),
    default=0.02,
    show_default=True,
    help="Accepted drop of accuracy, as a share.",
)
@click.option(
    "--noise",
    "noise",
    multiple=True,
    type=click.Path(path_type=Path),
    help="DENSE evaluated again (other batch size, dtype or engine): flips are shown above its. "
    "May be repeated.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write JSON here.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    dense: Path,
    pruned: Path,
    tasks: tuple[str, ...],
    common: bool,
    verdict: str,
    as_json: bool,
    noise: tuple[Path, ...],
    output: Path | None,
    quiet: bool,
    **settings: Any,
) -> None:
    """Compare the answers of DENSE and PRUNED: two folders that lm_eval or OpenCompass wrote.

    lm_eval needs --log_samples. For OpenCompass, give a run or its predictions/<model> folder. Both
    runs must have the same prompts and documents; the first difference is shown otherwise.
    """
    from streamline_bench.report.text import terminal_text
    from streamline_bench.stability.compare_answers import compare_answers
    from streamline_bench.stability.readers.load import load_samples
    from streamline_bench.stability.settings import Settings

    def load(path: Path, run: str) -> Samples:
        return load_samples(path, run=run, progress=not quiet)

    before = load(dense, "dense")
    options: dict[str, Any] = {
        "tasks": tasks or None,
        "common_only": common,
        "settings": Settings(verdict="correct" if verdict == "acc" else "correct_norm", **settings),
    }
    after = load(pruned, "pruned")
    result = compare_answers(before, after, **options)
    if noise:
        from streamline_bench.stability.noise import above_noise, noise_floor

        again = [load(path, f"noise {number}") for number, path in enumerate(noise, start=1)]
        result = above_noise(result, noise_floor(before, again, **options))
    payload = result.model_dump_json(indent=2)
    if output is not None:
        from streamline_bench.core.files.staging import atomic_write_text

        atomic_write_text(output, payload + "\n")
    if as_json:
        click.echo(payload)
    else:
        if result.tasks:
            print_table(_table(result))
        click.echo(_footnote(result))
        for info in (before.info, after.info):
            click.echo("".join(f"Not read of {info.run}: {terminal_text(name)} "
                               f"({terminal_text(why)}).\n" for name, why in info.left_out.items()),
                       nl=False)  # fmt: skip


def _table(result: Comparison) -> Table:
    from rich.table import Table

    table = Table(title="Pruned against dense, in %")
    table.add_column("task", overflow="fold", min_width=16)
    for name in ("n", "dense", "pruned", "change\n(Holm's)\nverdict", "stability", "agreement",
                 "lost/gained", "p\n(Holm's)"):  # fmt: skip
        table.add_column(name, justify="right")
    for task in result.tasks:
        name = task.task if task.filter == "none" else f"{task.task} ({task.filter})"
        table.add_row(*_cells(name, task))
    if result.groups:
        table.add_section()
    for group in result.groups:
        table.add_row(*_group_mean(group))
        table.add_row(*_cells(f"{group.group}, documents", group))
    if len(result.tasks) > 1 and result.macro is not None and result.micro is not None:
        table.add_section()
        table.add_row(*_cells("mean over tasks", result.macro))
        table.add_row(*_cells("all documents", result.micro))
    return table


def _group_mean(group: GroupComparison) -> list[str]:
    """The unweighted mean over the tasks of a group, of which only stability has an interval."""
    from rich.markup import escape

    from streamline_bench.report.text import percent, points, terminal_text

    dense, pruned = group.macro_dense, group.macro_pruned
    change = None if dense is None or pruned is None else pruned - dense
    return [
        escape(terminal_text(f"{group.group}, mean of {len(group.tasks)} tasks")),
        str(group.n),
        percent(dense),
        percent(pruned),
        points(change),
        escape(_with_interval(group.macro_stability)),
    ]


def _with_interval(estimate: Estimate | None) -> str:
    from streamline_bench.report.text import interval, percent

    if estimate is None:
        return percent(None)
    return f"{percent(estimate.value)}\n{interval(estimate)}".strip()


def _cells(name: str, row: TaskComparison | GroupComparison | Overall) -> list[str]:
    from rich.markup import escape

    from streamline_bench.report.text import (
        interval,
        p_value,
        percent,
        points,
        terminal_text,
        with_error,
    )

    difference = row.difference
    verdict: str = "no worse" if row.decision == "no worse than margin" else row.decision or ""
    change, p = [points(row.difference.value), interval(difference, signed=True)], [row.p_value]
    if row.adjusted is not None:
        change.append(interval(row.adjusted, signed=True))
        p.append(row.p_holm)
    cells = [
        terminal_text(name),
        str(row.n),
        with_error(row.dense),
        with_error(row.pruned),
        "\n".join([*change, verdict]),
        _with_interval(row.stability),
        percent(row.agreement.value),
        f"{row.flips.right_to_wrong}/{row.flips.wrong_to_right}\n{_above_noise(row)}",
        "\n".join(map(p_value, p)),
    ]
    return [escape(cell.strip()) for cell in cells]


def _above_noise(row: TaskComparison | GroupComparison | Overall) -> str:
    from streamline_bench.report.text import interval, points

    excess = row.flips_above_noise
    if excess is None:
        return ""
    return f"{points(excess.value)} % above\n{interval(excess, signed=True)}"


def _perplexity(found: PerplexityComparison) -> str:
    from streamline_bench.report.text import terminal_text

    name = f"{terminal_text(found.task)}, perplexity per {found.unit}"
    ratio = found.ratio
    if found.dense is None or found.pruned is None or ratio is None:
        return f"{name}: {found.nats_per_unit.value:+.4g} nats."
    ends = "" if ratio.low is None else f" [{ratio.low:.4g}, {ratio.high:.4g}]"
    return f"{name}: {found.dense:.4g}, {found.pruned:.4g}, ratio {ratio.value:.4g}{ends}."


def _generation(found: GenerationComparison) -> str:
    from streamline_bench.report.text import percent, terminal_text

    name = f"{terminal_text(found.task)} ({terminal_text(found.filter)})"
    parted = "" if found.first_word is None else f", the others part at word {found.first_word:g}"
    return f"{name}: {percent(found.identical.value)} % of the texts are identical{parted}."


_WITHOUT_VERDICTS = (
    "No task has right or wrong answers: no accuracy, flips or stability. Intervals are over "
    "documents."
)


def _of_verdicts(result: Comparison) -> str:
    return (
        f"Stability: {result.mode}, spread of {result.quantity} over the choices "
        f"(ddof {result.ddof}). {100 * result.confidence:g} % intervals. Change and p: one score "
        "test (McNemar's; Tango's interval), over clusters of documents where there are some. "
        "Verdict: by Holm's interval and p, adjusted over the tasks (over the groups for groups). "
        f"'no worse': the interval of the change excludes a drop of "
        f"{100 * (result.margin or 0):g} points or more."
    )


def _footnote(result: Comparison) -> str:
    from streamline_bench.report.text import terminal_text
    from streamline_bench.stability.readers.verdicts import GRADED

    lines = [_of_verdicts(result) if result.tasks else _WITHOUT_VERDICTS]
    lines += [_perplexity(found) for found in result.perplexities]
    lines += [_generation(found) for found in result.generations]
    shown = {found.task for found in result.perplexities}
    shown |= {found.task for found in result.generations}
    lines += [
        f"Not compared: {terminal_text(task)} ({terminal_text(reason)})."
        for task, reason in result.not_compared.items()
        if task not in shown or reason == GRADED
    ]
    return "\n".join(lines)
