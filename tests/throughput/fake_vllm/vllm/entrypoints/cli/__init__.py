"""Stands in for vLLM where it is not installed."""
