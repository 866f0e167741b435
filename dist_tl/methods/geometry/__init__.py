"""Geometric pseudo-labels (after G2L): classes from the simplices that items span with anchors.

After Kender, Bhattacharjee, Dube, Belgodere, "G2L: A Geometric Approach for Generating
Pseudo-labels that Improve Transfer Learning", arXiv:2207.03554.
"""
