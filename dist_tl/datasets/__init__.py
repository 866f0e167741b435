"""Labelled target data in memory: sources, splits, and views (augmentation)."""
