"""Engine, scheduler, decoding step, verification and acceptance rules."""
