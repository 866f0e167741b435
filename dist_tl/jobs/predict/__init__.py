"""Predictions of a stored hub."""
