"""Transfer of a learned feature map between correlated hidden manifolds: samples, theory and fits.

After Gerace et al., "Probing transfer learning with a model of synthetic correlated datasets",
arXiv:2106.05418; the theory is the Gaussian covariate model of Loureiro et al., arXiv:2102.08127.
"""
