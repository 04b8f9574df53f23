"""Reads heads of other trainers, and writes heads for other engines. One module per checkpoint format."""

# What heads are written for, see `formats.export`. Here, so that a command can check it without loading torch.
ENGINES = ("official", "vllm", "sglang", "speculators", "llama.cpp", "gguf")
