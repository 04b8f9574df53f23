"""Drafters: each proposes one draft tree per step and row. None imports the engine."""
