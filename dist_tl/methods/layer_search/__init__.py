"""Layer search (after ATL): selects the hidden feature maps of a frozen teacher for a small task.

After Jung H. Lee et al., "Adaptive Transfer Learning: a simple but effective transfer learning",
arXiv:2111.10937. The paper does not state its selection rule; the rule here is ours.
"""
