"""Conditional generators (placeholder by the lead so that others can import; OWNER: overwrite)."""
