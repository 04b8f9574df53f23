"""An OpenAI-compatible server over the one engine: with drafting on, every field of an answer is what it is without."""
