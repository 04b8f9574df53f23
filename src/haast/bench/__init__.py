"""Measurement: decoders side by side in one run, on one clock, by one counting rule."""
