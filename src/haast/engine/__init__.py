"""Requests, the scheduler that serves them, verification and the acceptance rules."""
