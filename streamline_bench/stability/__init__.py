"""Aligned answers of two runs: stability, flips, paired intervals and tests."""
