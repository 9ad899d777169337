"""From a request to a plan: rows, tasks, recipes, all resolved."""
