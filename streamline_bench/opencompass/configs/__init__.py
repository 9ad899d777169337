"""Configs for ``read_base``: data sets, the bundled models, summarizers.

mmengine reads these files as text from where the package is installed, so that
``from streamline_bench.opencompass.configs.paper import paper_datasets`` inside
``with read_base():`` works from a checkout and from a wheel. They hold plain assignments only.
"""
