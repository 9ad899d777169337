"""How long ``--help`` takes: of the whole command and of every subcommand, beside bare Python.

    python tests/benchmarks/help_time.py [--rounds N] [--target RATIO]

All take turns, round by round; counted is processor time of the process and its children. The peers
are ``python -c pass`` and ``python -c "import click"``, below which no command of click can be. The
exit code is 1 if the slowest takes more than ``--target`` times ``import click``. The harness
answers ``lm-eval --help`` itself, so that it is left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence

from streamline_bench.cli.main import COMMANDS

PEERS = {"python -c pass": ("-c", "pass"), "import click": ("-c", "import click")}
TARGET = 3.0


def commands() -> dict[str, Sequence[str]]:
    """Name -> what Python is to run."""
    ours = ("-m", "streamline_bench")
    named = {name: (*ours, name, "--help") for name in sorted(set(COMMANDS) - {"lm-eval"})}
    return {**PEERS, "--help": (*ours, "--help"), **named}


def seconds(arguments: Sequence[str]) -> float:
    """Processor time of one call."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def missed(medians: Mapping[str, float], target: float) -> str | None:
    """A sentence on the slowest command, if it is beyond the target."""
    peer = medians["import click"]
    name, slowest = max(
        ((name, value) for name, value in medians.items() if name not in PEERS),
        key=lambda item: item[1],
    )
    if slowest <= target * peer:
        return None
    return f"'{name}' takes {slowest / peer:.2f} times 'import click' (target {target:g})."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--target", type=float, default=TARGET, help="times 'import click'")
    parser.add_argument("--as-json", action="store_true")
    options = parser.parse_args()
    asked = commands()
    for arguments in asked.values():
        seconds(arguments)  # the first call of each writes byte code
    rounds = [
        {name: seconds(arguments) for name, arguments in asked.items()}
        for _ in range(options.rounds)
    ]
    medians = {name: statistics.median(one[name] for one in rounds) for name in asked}
    if options.as_json:
        print(json.dumps({name: round(value, 4) for name, value in medians.items()}))
    else:
        peer = medians["import click"]
        for name, value in medians.items():
            print(f"{name:16} {1000 * value:6.0f} ms  {value / peer:5.2f} x import click")
    fault = missed(medians, options.target)
    if fault is not None:
        print(fault, file=sys.stderr)
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
