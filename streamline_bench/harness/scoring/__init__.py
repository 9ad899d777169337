"""Loglikelihoods of continuations: packing requests into rows, and the forward pass over them."""
