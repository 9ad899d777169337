"""Tests, intervals and summary numbers of paired answers."""
