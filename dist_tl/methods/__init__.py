"""The mathematics of each method: pure PyTorch, one sub-package per paper, no distributed code."""
