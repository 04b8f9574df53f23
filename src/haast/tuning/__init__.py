"""Decides how much to draft: measured costs, calibrations, and a policy that follows each request's acceptance."""
