"""Heads of other trainers and engines: read from their files, and written for them. One file a family."""
