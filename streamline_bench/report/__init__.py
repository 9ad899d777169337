"""Run folder -> ``leaderboard.json``; CSV, Markdown, HTML and model cards are views of it."""
