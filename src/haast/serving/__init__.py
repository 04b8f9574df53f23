"""OpenAI-compatible server on top of the engine. Drafting changes no field of an answer."""
