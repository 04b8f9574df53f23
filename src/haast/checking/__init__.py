"""The verifier: does drafted decoding say what vanilla says? Owns the comparison and its statistics.

`divergence` compares texts token by token and tells a floating-point tie from a bug; `distribution` tests what is
sampled. Both recompute what they judge by: plain forwards over the history, never the tree's own logits.
"""
