"""The schema of recipes and how wrong values are reported."""
