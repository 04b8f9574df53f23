"""Drafters: each proposes one tree per step from what it has observed. None imports the engine."""
