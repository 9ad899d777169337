"""Files of lm-eval, OpenCompass and our own, read into one table of samples."""
