"""Reads heads of other trainers, and writes heads for other engines. One module per checkpoint format."""
