"""Pseudo-labels by geometry, and what they are worth."""
