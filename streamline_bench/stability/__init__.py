"""Aligned answers of two runs: stability, flips, paired intervals and tests.

``compare.compare(samples.load_samples("out/dense"), samples.load_samples("out/pruned"))`` is the
whole of it: a ``comparison.Comparison`` with a row per task.
"""
