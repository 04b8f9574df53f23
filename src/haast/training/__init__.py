"""Training of draft heads on the target's own answers (EAGLE, arXiv 2401.15077, section 3.2).

    prompts -> regenerate.py -> answers + feature shards -> features.py -> batches.py -> trainer.py -> a head

This package does not decode with a head: the trainer is given a function that measures tau with the real engine.
"""
