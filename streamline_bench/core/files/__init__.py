"""Files and folders: atomic writes, locks, YAML, versioned JSON, the cache."""
