"""Routing over a hub of experts, in pure PyTorch.

After Shu, Cao, Zhang, Wang, Long, "Hub-Pathway: Transfer Learning from A Hub of Pre-trained
Models", NeurIPS 2022, arXiv:2206.03726. Details that its abstract
leaves open are our own.
"""
