"""Haast as a decoding method of transformers' own `generate`: `model.generate(..., custom_generate=...)`."""
