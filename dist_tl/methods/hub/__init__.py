"""Routing over a hub of experts, pure torch.

After Shu, Cao, Zhang, Wang, Long, "Hub-Pathway: Transfer Learning from A Hub of Pre-trained
Models", NeurIPS 2022, arXiv:2206.03726. What that paper's abstract leaves open is decided here.
"""
