"""Labelled target data held in memory, how it is split, and the views (augmentation) of it."""
