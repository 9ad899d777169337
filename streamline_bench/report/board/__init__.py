"""From run folder and comparisons to a ``Leaderboard``."""
