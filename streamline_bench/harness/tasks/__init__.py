"""Which tasks were asked for, and whether their data is there."""
