"""The model that is decoded: loading, checks, forwards over trees, and the KV pool."""
