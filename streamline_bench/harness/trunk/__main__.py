"""``python -m streamline_bench.harness.trunk REQUEST.json``: a shared walk as a job of its own.

Exit codes: 0 all labels are evaluated, 1 some failed (the outcome says which), 2 the request cannot
be carried out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from streamline_bench.core.machine.environment import printable
from streamline_bench.errors import StreamlineBenchError


def main(arguments: list[str]) -> int:
    """Carry out the request in the named file and return the exit code."""
    from streamline_bench.harness.trunk.request import TrunkRequest

    if len(arguments) != 1:
        sys.stderr.write("usage: python -m streamline_bench.harness.trunk REQUEST.json\n")
        return 2
    try:
        request = TrunkRequest.read(Path(arguments[0]))
        from streamline_bench.harness.trunk.score import score_together

        outcome = score_together(request)
    except StreamlineBenchError as error:
        sys.stderr.write(f"streamline-bench: {printable(error)}\n")
        return 2
    for label, reason in outcome.failed.items():
        sys.stderr.write(f"streamline-bench: {printable(f'{label}: {reason}')}\n")
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
