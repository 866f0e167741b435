"""The mathematics of each method: pure torch, one sub-package a paper, no machinery."""
