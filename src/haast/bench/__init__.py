"""Measurement: runs decoders interleaved with one timer and one rule for counting tokens, and reports them."""
