"""Jobs of a comparison: what each is asked and what its process does."""
