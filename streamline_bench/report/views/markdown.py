"""``leaderboard.md``: the leaderboard as GitHub Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from streamline_bench.report.leaderboard import Leaderboard, Published, Row, TaskScore
from streamline_bench.report.text import (
    MISSING,
    count,
    decimal,
    duration,
    interval,
    markdown_text,
    p_value,
    percent,
    points,
    rate,
    ratio,
    significant,
    stored,
    times,
    visible_text,
    with_error,
)
from streamline_bench.report.views.overview import (
    commands_by_stage,
    headline,
    perplexity_ratio,
    ranked,
)
from streamline_bench.stability.comparison import Estimate


def to_markdown(board: Leaderboard) -> str:
    """Render the leaderboard as Markdown; every string of a run is escaped."""
    rows = [row for row in ranked(board.rows) if row.failed is None]
    compared = [row for row in rows if row.macro]
    parts = [
        f"# {markdown_text(board.title)}",
        markdown_text(headline(board)),
        "## Leaderboard",
        _leaderboard(rows),
        _columns_note(board, rows),
        _noise(board),
        *(
            f"Failed: {markdown_text(row.label)}: {markdown_text(row.failed)}"
            for row in board.rows
            if row.failed is not None
        ),
        *_headed("## Failed work other than rows", _listed(board.failed_jobs)),
        *_headed("## Accuracy by task", _by_task(rows, lambda task: with_error(task.accuracy))),
        *_headed("## Difference by task", _by_task(compared, _change), _change_note(board)),
        *_headed("## Stability by task", _by_task(compared, _stability)),
        *_headed("## Perplexity", _perplexities(board, rows)),
        *_headed("## Published numbers and ours", _published(rows), _PUBLISHED_NOTE),
        "## How the numbers were made",
        _settings(board),
        _provenance(rows),
        *_headed("### Values other than the recipe's own", _overridden(rows)),
        *_headed("### Commands", *_commands(board)),
        *_headed("Not compared:", _listed(board.not_compared)),
        *_headed("Not read:", _listed(board.not_read)),
        *(f"Note: {markdown_text(sentence)}" for sentence in board.ignored_options),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_interval(estimate: Estimate | None, *, signed: bool = False) -> str:
    """``−3.1 [−5.0, −1.2]``; nothing without an estimate."""
    if estimate is None:
        return ""
    write = points if signed else percent
    return f"{write(estimate.value)} {interval(estimate, signed=signed)}".strip()


def markdown_code(lines: Iterable[str]) -> str:
    """Indented code: no fence that its content could close."""
    return "\n".join(f"    {visible_text(line)}" for line in lines)


def _headed(heading: str, *parts: str) -> list[str]:
    """Nothing where the first part, the table, is empty."""
    return [heading, *parts] if parts and parts[0] else []


def _listed(reasons: dict[str, str]) -> str:
    return "\n".join(f"- {markdown_text(name)}: {markdown_text(r)}" for name, r in reasons.items())


# The leaderboard ---------------------------------------------------------------------------------


def _leaderboard(rows: Sequence[Row]) -> str:
    """One line per row; a column in which every cell is empty is left out."""
    columns = [(name, cell) for name, cell in _COLUMNS if any(cell(row) for row in rows)]
    body = [[cell(row) or MISSING for _, cell in columns] for row in rows]
    return table([name for name, _ in columns], body)


def _flips(row: Row) -> str:
    if row.micro is None:
        return ""
    return f"{row.micro.flips.right_to_wrong} / {row.micro.flips.wrong_to_right}"


def _above_noise(row: Row) -> str:
    return with_interval(row.micro.flips_above_noise, signed=True) if row.micro else ""


def _perplexity(row: Row) -> str:
    """Only where it ranks the rows; a table of its own shows it in any case."""
    return "" if row.accuracy_macro or row.is_dense else ratio(perplexity_ratio(row))


def _speed(row: Row) -> str:
    if row.throughput is None:
        return ""
    if row.speed is None:
        return "failed"
    to_dense = f" ({times(row.speed.ratio)})" if row.speed.ratio is not None else ""
    return f"{rate(row.speed.output_tokens_per_second)}{to_dense}"


_COLUMNS: Sequence[tuple[str, Callable[[Row], str]]] = (
    ("row", lambda row: markdown_text(row.label)),
    ("cost", lambda row: markdown_text(row.cost or "")),
    ("accuracy %", lambda row: with_error(row.accuracy_macro) if row.accuracy_macro else ""),
    (
        "difference",
        lambda row: with_interval(row.macro.difference, signed=True) if row.macro else "",
    ),
    ("verdict", lambda row: markdown_text((row.macro and row.macro.decision) or "")),
    ("stability %", lambda row: with_interval(row.macro.stability) if row.macro else ""),
    ("retention %", lambda row: with_interval(row.macro.retention) if row.macro else ""),
    ("agreement %", lambda row: with_interval(row.macro.agreement) if row.macro else ""),
    ("flips", _flips),
    ("above noise", _above_noise),
    ("p", lambda row: p_value(row.micro.p_value) if row.micro else ""),
    ("perplexity", _perplexity),
    ("token KL", lambda row: decimal(row.divergence.kl.value) if row.divergence else ""),
    ("tokens/s", _speed),
    ("parameters", lambda row: count(row.parameters) if row.parameters else ""),
    ("removed %", lambda row: percent(row.sparsity_reached) if row.sparsity_reached else ""),
    ("layers", lambda row: str(row.layers or "")),
    ("time", lambda row: duration(row.total_seconds) if row.seconds else ""),
)
"""Heading and cell; a column in which every cell is empty is left out."""


def _columns_note(board: Leaderboard, rows: Sequence[Row]) -> str:
    """What the columns of the leaderboard are."""
    dense, level = markdown_text(board.dense), board.level
    sentences = ["No task has right or wrong answers."]
    if any(row.accuracy_macro for row in rows):
        tests = [row.micro.p_method for row in rows if row.micro and row.micro.p_method]
        named = markdown_text("; ".join(dict.fromkeys(tests)))
        sentences = [
            f"Accuracy: mean over tasks ± standard error, in %. Difference to {dense} in points, "
            f"with {level} interval; the verdict follows from that interval and the margin. "
            "Stability: LLM-Streamline, equation 6. Flips: right to wrong / wrong to right.",
            *["Above noise: flips beyond those of the same model again, in points."]
            * any(_above_noise(row) for row in rows),
            f"p: over all documents ({named})." if named else "",
        ]
    if any(_perplexity(row) for row in rows):
        mean = f"multiple of {dense}'s, geometric mean over tasks, with {level} interval"
        sentences.append(f"Perplexity: {mean}.")
    if any(row.divergence for row in rows):
        sentences.append("Token KL: KL(dense || row) per token of the run's text, in nats.")
    return " ".join(filter(None, sentences))


def _noise(board: Leaderboard) -> str:
    noise = board.noise
    if noise is None:
        return ""
    return (
        f"Noise floor: {percent(noise.flips.value, 2)} % of {noise.n} verdicts flip when "
        f"{markdown_text(noise.dense_run)} is evaluated again "
        f"({markdown_text(', '.join(noise.repeats))})."
    )


# Tables by task ----------------------------------------------------------------------------------


def _by_task(rows: Sequence[Row], cell: Callable[[TaskScore], str]) -> str:
    """One line per row, one column per task of any row."""
    tasks: dict[tuple[str, str], str] = {}
    for task in (task for row in rows for task in row.tasks):
        shots = f", {task.shots}-shot" if task.shots is not None else ""
        tasks.setdefault((task.task, task.filter), markdown_text(f"{task.name}{shots}"))
    if not tasks:
        return ""
    body = []
    for row in rows:
        found = {(task.task, task.filter): cell(task) for task in row.tasks}
        body.append([markdown_text(row.label), *(found.get(key, MISSING) for key in tasks)])
    return table(["row", *tasks.values()], body)


def _change(task: TaskScore) -> str:
    found = task.comparison
    if found is None:
        return MISSING
    parts = [with_interval(found.adjusted or found.difference, signed=True)]
    if found.p_holm is not None:
        parts.append(f"p {p_value(found.p_holm)}")
    return ", ".join([*parts, *([found.decision] if found.decision else [])])


def _change_note(board: Leaderboard) -> str:
    compared = (task.comparison for row in board.rows for task in row.tasks)
    if not any(found and found.adjusted for found in compared):
        return (
            f"In points. The {board.level} interval is of the one task, not adjusted for the "
            "number of tasks; p is adjusted by Holm, and the verdict follows from it and the "
            "margin."
        )
    return (
        f"In points. The {board.level} interval and p are adjusted by Holm over the row's tasks: "
        "the interval excludes 0 exactly where p is significant, and 'better' and 'worse' follow "
        "from them. Whether a drop of the margin is excluded follows from the interval of the one "
        "task, which is not adjusted and is in leaderboard.csv."
    )


def _stability(task: TaskScore) -> str:
    found = task.comparison
    return (with_interval(found.stability) if found else "") or MISSING


def _perplexities(board: Leaderboard, rows: Sequence[Row]) -> str:
    body = [
        [
            markdown_text(row.label),
            markdown_text(f"{found.task} per {found.unit}"),
            str(found.n),
            significant(found.dense),
            significant(found.pruned),
            ratio(found.ratio) or MISSING,
            decimal(found.nats_per_unit.value, signed=True),
        ]
        for row in rows
        for found in row.perplexities
    ]
    head = ["row", "text", "documents", markdown_text(board.dense), "row's", "ratio",
            "nats more per unit"]  # fmt: skip
    return table(head, body) if body else ""


def _published(rows: Sequence[Row]) -> str:
    body = [
        [
            markdown_text(row.label),
            markdown_text(item.model),
            markdown_text(item.metric),
            markdown_text(f"{stored(item.value)} {item.unit}"),
            _ours(item),
            percent(item.sparsity),
            percent(row.sparsity_reached) if item.ours else MISSING,
            markdown_text(item.source),
        ]
        for row in rows
        for item in row.published
    ]
    head = ["row", "published on", "metric", "published", "ours %", "removed % there",
            "removed % here", "source"]  # fmt: skip
    return table(head, body) if body else ""


_PUBLISHED_NOTE = (
    "Ours: this run's model on the benchmark of that name; stability and retention over all tasks. "
    "Model, prompts and calibration text differ from the paper's: compare the order, not the "
    "numbers."
)


def _ours(item: Published) -> str:
    if item.ours is None:
        return MISSING
    return f"{with_error(item.ours)} ({markdown_text(item.task or 'all tasks')})"


# How the numbers were made -----------------------------------------------------------------------


def _settings(board: Leaderboard) -> str:
    method = board.method
    versions = ", ".join(f"{name} {value}" for name, value in board.versions.items())
    return (
        f"Stability mode {markdown_text(method.mode)}, spread of {markdown_text(method.quantity)} "
        f"over the choices (ddof {method.ddof}); {method.draws} bootstrap draws, seed "
        f"{method.seed}; versions: {markdown_text(versions)}."
    )


def _provenance(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        origin = row.provenance
        weights = origin.weights_sha256 or origin.source_weights_sha256
        cells = [row.label, row.method or MISSING, (weights or MISSING)[:12],
                 origin.calibration.get("tokens", MISSING), origin.engine,
                 origin.results_file]  # fmt: skip
        body.append([markdown_text(cell) for cell in cells])
    return table(["row", "method", "weights", "tokens", "engine", "results"], body)


def _overridden(rows: Sequence[Row]) -> str:
    body = [
        [markdown_text(cell) for cell in (row.label, key, used, own)]
        for row in rows
        for key, (own, used) in row.overridden.items()
    ]
    return table(["row", "key", "used", "recipe's own"], body) if body else ""


def _commands(board: Leaderboard) -> list[str]:
    parts: list[str] = []
    for stage, lines in commands_by_stage(board.commands).items():
        parts += [f"{stage}:", markdown_code(" ".join(line.split()) for line in lines)]
    return parts
