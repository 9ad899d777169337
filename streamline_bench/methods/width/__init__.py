"""Methods that remove attention heads and MLP channels."""
