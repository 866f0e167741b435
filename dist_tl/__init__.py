"""Transfer learning when source data is out of reach, on a Ray cluster."""

__version__ = "0.1.0"
