"""Methods that remove experts of mixtures."""
