"""How much to draft: what steps cost here, what calibrations say, and what a request's own acceptance says since."""
