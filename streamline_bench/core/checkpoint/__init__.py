"""Checkpoints on disk: reading, writing, hashing, the manifest."""
