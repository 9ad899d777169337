"""Calibration text: corpora, files, and tokens made of them."""
