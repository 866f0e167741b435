"""Geometric pseudo-labels (after G2L): classes from the simplices spanned by items and anchors.

After Kender, Bhattacharjee, Dube, Belgodere, "G2L: A Geometric Approach for Generating
Pseudo-labels that Improve Transfer Learning", arXiv:2207.03554.
"""
