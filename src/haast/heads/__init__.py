"""Trainable draft modules: forward passes and their files. No decoding, no training."""
