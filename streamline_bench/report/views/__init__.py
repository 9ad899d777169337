"""What is written from a leaderboard: page, Markdown, CSV, model cards."""
