"""The version of this package, apart from the front door so that nothing below imports it."""

__version__ = "0.1.0"
