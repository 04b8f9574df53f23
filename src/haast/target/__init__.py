"""The target model: loading, checks, forwards over trees of draft tokens, and the KV pool."""
