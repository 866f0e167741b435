"""Thin Ray shells: processes, retries and back-pressure, no arithmetic. Owns ray."""
