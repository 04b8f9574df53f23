"""The verifier: does drafted decoding say what vanilla says? Owns the comparison and its statistics.

`divergence` compares texts token by token and tells a floating-point tie from a bug; `distribution` tests what is
sampled. Both recompute what they judge by: plain forwards over the history, never the tree's own logits.
"""

from haast.checking.distribution import (
    DistributionTest,
    chi_square,
    distribution_tests,
    sampled_distribution,
    tiny_distribution,
)
from haast.checking.divergence import Comparison, Divergence, compare, diagnose, tolerance

__all__ = [
    "Comparison",
    "DistributionTest",
    "Divergence",
    "chi_square",
    "compare",
    "diagnose",
    "distribution_tests",
    "sampled_distribution",
    "tiny_distribution",
    "tolerance",
]
