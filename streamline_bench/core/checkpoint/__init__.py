"""Checkpoints on disk: the model's folder, reading, writing, the manifest."""
