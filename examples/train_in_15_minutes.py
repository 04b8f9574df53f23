# %% [markdown]
# # Train a head in about 15 minutes
#
# The target answers prompts, a head learns to draft its answers, and the engine measures how much that saves. Run it
# cell by cell in an editor that knows `# %%`, or as `python examples/train_in_15_minutes.py`; with `--quick` it only
# shows that everything works. A run that was stopped continues where it was. This head has seen little: for a good one
# use more prompts, of the kind that your users send, and more views ([Train a head](../docs/training.md)).

# %%
import json
import os
import sys
from itertools import product
from pathlib import Path

from haast import Haast
from haast.drafters.factory import make_drafter
from haast.drafters.vanilla import VanillaDrafter
from haast.heads.checkpoint import load_head
from haast.prompts import Prompt, read_prompts
from haast.target.load import DEFAULT_MODEL, load_target
from haast.training import TrainConfig, TrainingData, train
from haast.training.answers import read_answers
from haast.training.config import RegenerateConfig
from haast.training.data import encode_answers
from haast.training.features import extract
from haast.training.generation_queue import AnswerRun
from haast.training.regenerate import regenerate
from haast.training.shards import ShardIdentity

# %% [markdown]
# ## Settings and plan
#
# `PROMPTS` is a file of JSON lines with `prompt` or `turns`; without one, tasks and topics are combined. Every 21st
# prompt is held out: a head is never measured on what it was trained on. `VIEWS` counts supervised tokens, repeats
# included.

# %%
QUICK = "--quick" in sys.argv
MODEL, OUT = os.environ.get("MODEL", DEFAULT_MODEL), Path(os.environ.get("OUT", "runs/in-15-minutes"))
TOKENS, VIEWS, LIMIT = (24, 300, 40) if QUICK else (128, 1_000_000, 600)
TASKS = (
    "Explain {} to a child.", "List five facts about {}.", "Write a short poem about {}.", "Why does {} matter?",
    "What do beginners get wrong about {}?", "Give a short history of {}.", "Write an email that asks about {}.",
    "Compare {} with something similar.", "How can I learn more about {}?", "Write a dialogue about {}.",
)  # fmt: skip
TOPICS = (
    "the moon", "bread", "chess", "rivers", "music", "bees", "trains", "money", "sleep", "glass", "maps", "tea", "rain",
    "bicycles", "bridges", "coffee", "computers", "dogs", "dreams", "farming", "fire", "football", "forests", "gardens",
    "gravity", "history", "ice", "insects", "language", "light", "medicine", "memory", "mountains", "numbers", "oceans",
    "painting", "paper", "photography", "plants", "poetry", "radio", "robots", "salt", "schools", "ships", "snow",
    "stars", "steel", "stories", "sugar", "teeth", "theatre", "time", "towns", "trees", "volcanoes", "water", "wind",
    "wood", "writing",
)  # fmt: skip
own = [Prompt(f"{task} {topic}", (task.format(topic),)) for topic, task in product(TOPICS, TASKS)]
prompts = read_prompts(os.environ["PROMPTS"], LIMIT) if "PROMPTS" in os.environ else own[:LIMIT]
held_out, taught = prompts[::21], [prompt for i, prompt in enumerate(prompts) if i % 21]
# Two cores of a server make about 500 tokens/s of answers and learn 4,000 views/s: results/regenerate.json and
# results/ablation.json. Your machine differs; every step below shows its own rate and the time left.
minutes = (len(taught) * TOKENS / 500 / 60, VIEWS / 4000 / 60)
print(f"plan for {MODEL}, in {OUT}")
print(f"  1. answers   {len(taught)} prompts, at most {TOKENS} tokens each: up to {minutes[0]:.0f} minutes")
print("  2. features  one forward over prompts and answers: about as long")
print(f"  3. training  {VIEWS} views: about {minutes[1]:.0f} minutes, and four evaluations")
print(f"  4. compare   with vanilla decoding on {len(held_out)} held-out prompts")

# %% [markdown]
# ## 1. Answers
#
# A head has to guess what the target says, so it learns from the target's own answers, half of them greedy and half
# sampled.

# %%
target = load_target(MODEL)
answers = OUT / "answers.jsonl"
config = RegenerateConfig(batch=64, max_new_tokens=TOKENS, temperatures="0:0.5,1:0.5")
done = regenerate(target, AnswerRun(target.tokenizer, taught, answers, config, MODEL))
print(f"answers: {done.added} new, {done.before} from before, {done.left_out} left out")

# %% [markdown]
# ## 2. Features
#
# The head reads the target's last hidden state at every position, and learns from its 16 most likely next tokens. Both
# are computed once and stored. Only the tokens of answers are supervised, not the prompts.

# %%
shards = OUT / "features"
sequences = encode_answers(target.tokenizer, read_answers(answers), target.context_length, target.vocab_size)
extract(target, sequences, shards, ShardIdentity.of(target, MODEL, topk=16))
print(f"features: {sum(len(each.tokens) for each in sequences)} positions of {len(sequences)} sequences")

# %% [markdown]
# ## 3. Training
#
# The head starts as a copy of the target's last layer. Four times the real engine decodes the held-out prompts, and the
# head with the highest tau (tokens per target forward) is kept.

# %%
valid = OUT / "valid.jsonl"
valid.write_text("".join(json.dumps({"prompt": each.turns[0]}) + "\n" for each in held_out), encoding="utf-8")
data = TrainingData(shards=shards, valid_prompts=valid, valid_limit=8)
every = {"evaluate_every": VIEWS // 4, "log_every": VIEWS // 10}
settings = TrainConfig(views=VIEWS, **every)
result = train(target, data, OUT / "head", settings, resume=any((OUT / "head").glob("state-*.pt")))

# %% [markdown]
# ## 4. tau
#
# If tau still grows at the end, more views pay; if it does not, more prompts do.

# %%
for line in result["metrics"]:
    print(f"{line['views']:9} views  tau {line['tau']:.3f}")

# %% [markdown]
# ## 5. Compare
#
# The same text, and the time it took. `examples/compare_drafters.py` measures with care; this is a first look.

# %%
drafted = Haast(target, make_drafter("eagle", target, load_head(Path(result["head"]))))
vanilla = Haast(target, VanillaDrafter())
print(f"{'tau':>5} {'speed-up':>9}  equal text  prompt")
for prompt in held_out[:8]:
    one, other = (each.generate(prompt.turns[0], max_new_tokens=TOKENS) for each in (drafted, vanilla))
    ratio = one.stats.tokens_per_s / (other.stats.tokens_per_s or 1.0)
    equal = "yes" if one.tokens == other.tokens else "no"
    print(f"{one.stats.tau:5.2f} {ratio:8.2f}x  {equal:10}  {prompt.turns[0]:.60}")
print(f"the head is in {result['head']}: haast generate --model {MODEL} --head {result['head']} 'Why is the sky blue?'")
