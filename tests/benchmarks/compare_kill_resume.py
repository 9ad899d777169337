"""Is a comparison that was killed three times the same as one that was left alone?

``kill -9`` hits the command's whole process group at random moments; what its jobs' processes do
then is part of the question. Afterwards the same command is left to finish, and both leaderboards
are compared value by value; times, dates and the run folder's own path are left out.

    python tests/benchmarks/compare_kill_resume.py                 # every recipe, trained briefly
    python tests/benchmarks/compare_kill_resume.py --plan bundled  # with the board's own trainings

Both run folders can be kept: ``--alone RUN`` may name a comparison that was finished before by the
same command, ``--killed RUN`` a new folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

BRIEFLY = Path(__file__).with_name("every_recipe_briefly.yaml")

LEFT_OUT = {"seconds", "date", "results_file", "created"}
"""Keys of a leaderboard that say when and how fast, not what."""


def command(options: argparse.Namespace, run: Path) -> list[str]:
    """The command line under test."""
    made = [sys.executable, "-m", "streamline_bench", "compare", "--plan", options.plan, "-q"]
    for name in ("recipes", "tasks", "limit", "workers", "threads"):
        if getattr(options, name) is not None:
            made += [f"--{name}", str(getattr(options, name))]
    made += [word for assignment in options.set for word in ("--set", assignment)]
    flags = ["--noise-floor"] if options.noise_floor else []
    flags += [] if options.trunk else ["--no-trunk"]
    return [*made, *flags, "-o", str(run)]


def finish(options: argparse.Namespace, run: Path) -> tuple[float, int]:
    """Run the command to its end; return the seconds it took, and 1 where rows have failed."""
    began = time.monotonic()
    done = subprocess.run(command(options, run), capture_output=True, text=True)
    if done.returncode not in (0, 1) or not (run / "leaderboard.json").is_file():
        sys.exit(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return time.monotonic() - began, done.returncode


def kill_once(
    options: argparse.Namespace, run: Path, seconds: float, *, walking: bool = False
) -> str:
    """Start the command, kill it after some time, and say how far it was.

    Args:
        walking: the time counts from the moment when rows are scored together.
    """
    process = subprocess.Popen(
        command(options, run),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while walking and process.poll() is None and not walks_of(run):
        time.sleep(0.05)
    try:
        process.wait(seconds)
        return f"had ended before {seconds:.1f} s"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    until = time.monotonic() + 10
    while left := list(processes_of(run)):
        if time.monotonic() > until:
            sys.exit(f"processes outlive the kill: {left}")
        time.sleep(0.05)
    done = len(list(run.glob("jobs/*/done.json")))
    since = " of scoring together" if walking else ""
    return f"killed after {seconds:.1f} s{since}, {done} jobs done, none left running"


def walks_of(run: Path) -> list[Path]:
    """Attempts of processes that score several rows."""
    return list(run.glob("jobs/score-together-*/attempts.json"))


def shares(done: Path) -> bool:
    """Whether a row was scored in a walk with others."""
    return bool(json.loads(done.read_text(encoding="utf-8"))["facts"].get("together"))


def processes_of(run: Path) -> Iterator[str]:
    """Command lines that name the run folder."""
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        own = process.pid == os.getpid() or process.info["status"] == psutil.STATUS_ZOMBIE
        if str(run) in line and not own:
            yield line


def started_again(run: Path) -> int:
    """Attempts beyond the first; jobs that failed are not counted, every start tries them again."""
    return sum(
        json.loads(path.read_text(encoding="utf-8")) - 1
        for path in run.glob("jobs/*/attempts.json")
        if not (path.parent / "failed.json").is_file()
    )


def facts(run: Path) -> Any:
    """The leaderboard without times and paths."""
    return facts_of(json.loads((run / "leaderboard.json").read_text(encoding="utf-8")), run)


def facts_of(board: Any, run: Path) -> Any:
    """The same of what a leaderboard's file holds."""
    return _strip(board, str(run))


def _strip(value: Any, run: str) -> Any:
    if isinstance(value, dict):
        return {key: _strip(each, run) for key, each in value.items() if key not in LEFT_OUT}
    if isinstance(value, list):
        return [_strip(each, run) for each in value]
    return value.replace(run, "RUN") if isinstance(value, str) else value


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Where two values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from differences(one.get(key), other.get(key), f"{path}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{path}[{number}]")
    elif one != other:
        yield f"{path}: {str(one)[:200]} / {str(other)[:200]}"


def main() -> None:
    """Compare the two runs; exit code 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", default=str(BRIEFLY))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--recipes")
    parser.add_argument("--tasks")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--noise-floor", action="store_true")
    parser.add_argument("--trunk", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", type=Path, help="folder of the uninterrupted run")
    parser.add_argument("--killed", type=Path, help="folder of the run that is killed")
    parser.add_argument(
        "--seconds", type=float, help="what an uninterrupted run takes; measured if not given"
    )
    options = parser.parse_args()
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        alone = options.alone or Path(folder, "alone")
        killed = options.killed or Path(folder, "killed")
        seconds, code = finish(options, alone)
        print(f"uninterrupted: {seconds:.0f} s, exit code {code}", flush=True)
        longest = (options.seconds or seconds) / options.kills
        for number in range(options.kills):
            walking = options.trunk and number == options.kills - 1
            # A walk is short beside what comes before it.
            after = dice.uniform(0.1, 0.9) * longest * (0.2 if walking else 1)
            print(kill_once(options, killed, after, walking=walking), flush=True)
        rest, code_again = finish(options, killed)
        print(f"the rest: {rest:.0f} s, exit code {code_again}", flush=True)
        repeated = started_again(killed)
        print(f"{repeated} jobs were started again after {options.kills} kills")
        print(f"{sum(map(shares, killed.glob('jobs/score-*/done.json')))} rows shared a walk")
        found = list(differences([code, facts(alone)], [code_again, facts(killed)]))
        print("\n".join(found[:20]) or "the leaderboards are the same")
        sys.exit(1 if found or repeated > options.kills * (options.workers or 1) else 0)


if __name__ == "__main__":
    main()
