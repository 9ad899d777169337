"""Running jobs: scheduling, local processes, Ray, progress."""
