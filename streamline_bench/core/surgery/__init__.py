"""Removing layers, sizes of models, replacement networks."""
