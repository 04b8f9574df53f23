"""Integration with transformers' `generate`: Haast as a decoding method, `model.generate(..., custom_generate=...)`."""
