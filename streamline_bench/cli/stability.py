"""``streamline-bench stability`` and ``divergence``: two models, by answers or distributions."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamline_bench.cli.options import (
    device_option,
    dtype_option,
    metrics_option,
    print_table,
    refuse_unwritable_file,
    setup_logging,
    write_json,
)

if TYPE_CHECKING:
    from streamline_bench.stability.samples import Samples

QUANTITIES = ["nll_per_byte", "nll_per_char", "nll", "ppl_per_byte", "ppl_per_char",
              "mean_token_nll"]  # fmt: skip


@click.command("stability")
@click.argument("dense", type=click.Path(path_type=Path))
@click.argument("pruned", type=click.Path(path_type=Path))
@click.option("--task", "tasks", multiple=True, help="Compare only this task or group.")
@click.option("--common", is_flag=True, help="Compare the tasks that both runs have.")
@click.option("--across-engines", is_flag=True,
              help="Compare answers of transformers with those of vLLM.")  # fmt: skip
@click.option("--mode", type=click.Choice(["paper", "reference_script"]), default="paper",
              help="The paper's equation, or its script's arithmetic.")  # fmt: skip
@click.option("--quantity", type=click.Choice(QUANTITIES),
              help="What stands for the perplexity of a choice  [default: mean_token_nll with "
              "OpenCompass, nll_per_byte with lm-eval]")  # fmt: skip
@click.option("--ddof", type=click.IntRange(0, 1), default=1)
@click.option("--verdict", type=click.Choice(["acc", "acc_norm"]), default="acc",
              help="'acc' stands for what judges the task by its own configuration.")  # fmt: skip
@metrics_option
@click.option("--confidence", type=click.FloatRange(0.5, 0.9999), default=0.95)
@click.option("--draws", type=click.IntRange(min=100), default=10_000)
@click.option("--margin", type=click.FloatRange(0, 1), default=0.02,
              help="Accepted drop of accuracy, as a share.")  # fmt: skip
@click.option("--noise", "noise", multiple=True, type=click.Path(path_type=Path),
              help="DENSE evaluated again (other batch size, dtype or engine): show flips above "
              "its flips. May be repeated.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write JSON here.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    dense: Path,
    pruned: Path,
    tasks: tuple[str, ...],
    common: bool,
    across_engines: bool,
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
    refuse_unwritable_file(output)
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
    if across_engines:
        before, after = (_named_by_engine(each) for each in (before, after))
        click.echo(f"Note: {before.info.run} against {after.info.run}.", err=True)
    if _same(before, after):
        click.echo("Note: DENSE and PRUNED are the same evaluation.", err=True)
    result = compare_answers(before, after, across_engines=across_engines, **options)
    if noise:
        from streamline_bench.stability.noise import above_noise, noise_floor

        again = [load(path, f"noise {number}") for number, path in enumerate(noise, start=1)]
        for path, each in zip(noise, again, strict=True):
            if _same(before, each):
                raise click.BadParameter(
                    f"'{path}' is DENSE itself, which shows no noise; give another evaluation of "
                    "the same model",
                    param_hint="--noise",
                )
        result = above_noise(result, noise_floor(before, again, **options))
    write_json(result, output, as_json)
    if not as_json:
        from streamline_bench.cli.tables import grades_table, stability_notes, stability_table

        if result.tasks:
            print_table(stability_table(result))
        if result.grades:
            print_table(grades_table(result))
        click.echo(stability_notes(result))
        for info in (before.info, after.info):
            click.echo("".join(f"Not read of {info.run}: {terminal_text(name)} "
                               f"({terminal_text(why)}).\n" for name, why in info.left_out.items()),
                       nl=False)  # fmt: skip


def _named_by_engine(samples: Samples) -> Samples:
    names = sorted(set(samples.info.computed_by.values()))
    return samples.relabelled(f"{samples.info.run} ({', '.join(names)})") if names else samples


def _same(one: Samples, other: Samples) -> bool:
    return Path(one.info.source).resolve() == Path(other.info.source).resolve()


@click.command("divergence")
@click.argument("dense")
@click.argument("pruned")
@click.argument("text", type=click.Path(path_type=Path))
@click.option("--text-field", default="text", help="Field of a record that holds the text.")
@click.option("--documents", type=click.IntRange(min=1), help="Read at most this many documents.")
@click.option("--window", type=click.IntRange(min=2), default=2048, help="Tokens per window.")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, help="Windows read at once.")
@device_option
@dtype_option("Dtype of the weights; distributions are compared in float32.")
@click.option("--confidence", type=click.FloatRange(0.5, 0.9999), default=0.95,
              help="Of the intervals.")  # fmt: skip
@click.option("--revision", help="Revision of DENSE on the hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the models.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def by_text(
    dense: str,
    pruned: str,
    text: Path,
    text_field: str,
    documents: int | None,
    revision: str | None,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Compare the next-token distributions of DENSE and PRUNED on TEXT.

    TEXT is a .txt, .json, .jsonl, .csv, .tsv or .parquet file, which may be compressed. The result
    has both perplexities and KL(dense || pruned) per token. KL also changes when probability moves
    between tokens that are not in the text.
    """
    setup_logging(quiet=quiet)
    from streamline_bench.core.checkpoint.folder import resolve_pretrained
    from streamline_bench.divergence import read_texts, token_divergence
    from streamline_bench.modeling.loading import load_tokenizer

    folder = resolve_pretrained(dense, revision)
    tokenizer = load_tokenizer(folder, trust_remote_code=settings["trust_remote_code"])
    texts = itertools.islice(read_texts(text, text_field, tokenizer), documents)
    first = list(itertools.islice(texts, 1))  # what is wrong with the file is said before any work
    result = token_divergence(
        folder, pruned, itertools.chain(first, texts), progress=not quiet, **settings
    )
    write_json(result, None, as_json)
    if not as_json:
        from streamline_bench.cli.tables import divergence_table

        print_table(divergence_table(result))
