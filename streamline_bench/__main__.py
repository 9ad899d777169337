"""``python -m streamline_bench`` is the ``streamline-bench`` command."""

from streamline_bench.cli.main import main

main()
