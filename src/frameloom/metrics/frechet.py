"""How far two sets are from each other: the Fréchet distance between Gaussians fitted to their features."""

import torch
from jaxtyping import Float
from torch import Tensor


def moments(features: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "d"], Float[Tensor, "d d"]]:
    """Mean and covariance (divided by n - 1; zero for one row) in float64."""
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / max(1, len(features) - 1)


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)), squared units of the features; 0 for equal sets.

    The trace of the root is the sum of the singular values of A^(1/2) B^(1/2), whose roots are those of symmetric
    matrices: exact in float64 for covariances of any rank, so for fewer rows than features too. It falls as sets
    grow, so compare only figures from equally many rows. D. Dowson and B. Landau, The Fréchet distance between
    multivariate normal distributions, Journal of Multivariate Analysis 12, 1982; as a measure of generators,
    M. Heusel et al., GANs Trained by a Two Time-Scale Update Rule..., 2017 (arXiv 1706.08500).
    """
    (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
    shared = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared
    return max(0.0, float(distance))


def _root(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The square root of a covariance; eigenvalues that rounding took below 0 are 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
