"""Aligned answers of two runs: stability, flips, paired intervals and tests.

``compare_answers(load_samples("out/dense"), load_samples("out/pruned"))`` gives a ``Comparison``
with a row per task.
"""
