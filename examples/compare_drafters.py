# %% [markdown]
# # Which drafter suits your prompts?
#
# A drafter cannot change the text, so the fastest one is the best one. Which one that is depends on the text:
# repetition suits `suffix`, free text a head. This notebook measures it on your own prompts. An editor that knows
# `# %%` runs it cell by cell, `PROMPTS=prompts.jsonl python examples/compare_drafters.py` from top to bottom.

# %%
import os

from haast import Haast, SamplingParams
from haast.bench.aggregate import build_rows
from haast.bench.decoders import EngineDecoder
from haast.bench.runner import BenchConfig, BenchPrompt, Suite, differences, run_suite
from haast.drafters.factory import alternatives
from haast.prompts import Prompt, read_prompts
from haast.target.load import DEFAULT_MODEL

# %% [markdown]
# ## Settings
#
# `PROMPTS` is a file of JSON lines with `prompt` or `turns`, of which the first turn is used. `HEAD` is a head's
# folder; with another `MODEL` than the default one give its head, or "none". More rounds give steadier medians.

# %%
MODEL, HEAD = os.environ.get("MODEL", DEFAULT_MODEL), os.environ.get("HEAD", "default")
LIMIT, TOKENS, ROUNDS = (int(os.environ.get(*each)) for each in (("LIMIT", "8"), ("TOKENS", "96"), ("ROUNDS", "3")))
EXAMPLES = ("Why is the sky blue?", "Write a Python class for a stack.", "Say ten times: red, green, blue.")
PROMPTS = os.environ.get("PROMPTS")
prompts = read_prompts(PROMPTS, LIMIT) if PROMPTS else [Prompt(str(i), (text,)) for i, text in enumerate(EXAMPLES)]

# %% [markdown]
# ## The drafters
#
# One model and one head are loaded for all. Add a drafter of your own to the dictionary: `examples/own_drafter.py`
# shows how to write one.

# %%
haast = Haast.from_pretrained(MODEL, head=None if HEAD == "none" else HEAD)
drafters = alternatives(haast.target, haast.drafter)
drafters = {"vanilla": drafters.pop("none"), **drafters}
print("drafters:", ", ".join(drafters))

# %% [markdown]
# ## Measure
#
# The drafters take turns on every prompt, in random order, so that a machine that slows down for a while slows all of
# them. Decoding is greedy; prefill and its token are not counted.

# %%
ends = haast.target.end_ids
decoders = [EngineDecoder(haast.target, drafter, SamplingParams(), ends, name) for name, drafter in drafters.items()]
encoded = tuple(BenchPrompt(prompt.id, prompt.category, tuple(haast.encode(prompt.turns[0]))) for prompt in prompts)
cells = run_suite({0.0: decoders}, {"mine": Suite("mine", "", encoded)}, BenchConfig(TOKENS, ROUNDS), {})
answers = cells[0.0, "mine"]  # by drafter: for each prompt, the answer of each round

# %% [markdown]
# ## The table
#
# `tau` is the number of tokens per target forward, the bonus token included. Texts differ from vanilla's only at a tie:
# the two best tokens at the first difference are then equal up to rounding. Anything else is a bug, please report it.

# %%
different = differences(answers, encoded, haast.target, SamplingParams())
print(f"{'drafter':14} {'tau':>5} {'tokens/s':>9} {'speed-up':>9}  equal text")
for row in build_rows(answers, encoded):
    other = [each.kind for each in different if each.decoder == row["decoder"]]
    equal = ", ".join([f"{len(encoded) - len(other)} of {len(encoded)}", *(f"1 {kind}" for kind in other)])
    speed = f"{row['tokens_per_s']:9.1f} {row['speedup_vs_vanilla']:8.2f}x"
    print(f"{row['decoder']:14} {row['tau']:5.2f} {speed}  {equal}")

# %% [markdown]
# Use the winner with `Haast.from_pretrained(MODEL, head=HEAD, drafter="suffix")`. If vanilla wins, the drafts of the
# others are not accepted often enough on this machine: [Speed](../docs/speed.md) says what a draft has to earn.
