"""Files that a report is made from and the schema of ``leaderboard.json``."""
