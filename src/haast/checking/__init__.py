"""Lossless checks: compares drafted decoding with vanilla decoding. Owns the comparison and its statistics.

`divergence` compares texts token by token and classifies a difference as a floating-point tie or a bug; `distribution`
tests the sampled distribution. Both use logits of plain forwards over the history, never the tree's own logits.
"""
