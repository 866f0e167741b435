"""Transfer through a conditional generator: pseudo pre-training, P-SSL, and quality measures.

After Yamaguchi et al., "Transfer Learning with Pre-trained Conditional Generative Models",
arXiv:2204.12833.
"""
