"""Compression methods behind one interface (:mod:`streamline_bench.methods.base`)."""
