"""Does a run keep the accuracy, stability and speed of a reference? A table, and a yes or no."""
