"""The verifier: does drafted decoding say what vanilla says? Owns the comparison and its statistics.

`divergence` compares texts token by token and tells a floating-point tie from a bug; `law` tests the distribution of
what is sampled. Both recompute what they judge by: plain forwards over the history, never the tree's own logits.
"""

from haast.checking.distribution import LawTest, chi_square, sampled_law, tiny_law
from haast.checking.divergence import Comparison, Divergence, compare, diagnose, tolerance

__all__ = [
    "Comparison",
    "Divergence",
    "LawTest",
    "chi_square",
    "compare",
    "diagnose",
    "sampled_law",
    "tiny_law",
    "tolerance",
]
