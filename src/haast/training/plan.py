"""The plan of a head: how many answers, views and minutes, from rates that a short trial measures on this machine.

Owns the estimate. Does not run the stages, see `make_head`. The estimate of an answer's length is rough until there are
answers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from haast.core import SamplingParams, StopParams
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine
from haast.prompts import Prompt, evenly
from haast.target.target import Target
from haast.training.chat import encode_prompt
from haast.training.config import RegenerateConfig, TrainConfig
from haast.training.data import TokenSequence
from haast.training.features import stream_examples
from haast.training.mix import turns_of
from haast.training.run import head_config, layer_ids
from haast.training.target_weights import TargetWeights
from haast.training.trainer import Trainer

_TRIAL_TOKENS, _TRIAL_PROMPTS, _TRIAL_STEPS = 48, 64, 2
# An answer ends by itself: of the first 256 tokens that it may have it takes about 0.7, of the others 0.25.
_SHORT, _OF_SHORT, _OF_LONG = 256, 0.7, 0.25
_FEWEST_ANSWERS = 100


@dataclass(frozen=True)
class Rates:
    """What the trial measured on this machine."""

    answers: float  # tokens/s, in batches
    features: float  # tokens/s
    training: float  # supervised tokens/s with one pass
    aligned: float  # supervised tokens/s with all passes
    prompt_tokens: float  # mean length of a prompt


@dataclass(frozen=True)
class Plan:
    """The sizes of a run, and the minutes of its stages."""

    answers: int
    tokens_per_answer: float
    views: int
    minutes: tuple[float, float, float]  # answers, features, training

    def lines(self) -> list[str]:
        """The plan in words, a line per stage."""
        tokens = self.answers * self.tokens_per_answer
        stages = (
            f"answers   {self.answers} of about {self.tokens_per_answer:.0f} tokens",
            f"features  {tokens / 1e6:.2g} M supervised tokens and their prompts",
            f"training  {self.views / 1e6:.2g} M views",
        )
        lines = [f"{stage:58} {each:7.1f} min" for stage, each in zip(stages, self.minutes, strict=True)]
        return [*lines, f"{'together, by rates measured on this machine':58} {sum(self.minutes):7.1f} min"]


def make_plan(
    rates: Rates, prompts: Sequence[Prompt], answering: RegenerateConfig, settings: TrainConfig, minutes: float | None
) -> Plan:
    """The plan for `answering.answers` (None: all), or for the most answers that fit into `minutes`.

    Raises:
        ValueError: a useful head does not fit into `minutes`.
    """
    most = sum(turns_of(prompt, answering) for prompt in prompts)
    count = min(answering.answers or most, most)
    plan = _plan(rates, count, answering, settings)
    if minutes is None or sum(plan.minutes) <= minutes:
        return plan
    low, high = min(_FEWEST_ANSWERS, count), count
    fewest = _plan(rates, low, answering, settings)
    if sum(fewest.minutes) > minutes:
        raise ValueError(
            f"minutes={minutes:g} is too short: {low} answers and {fewest.views} views take {sum(fewest.minutes):.0f} "
            f"minutes on this machine; give more minutes, or fewer --views"
        )
    while high - low > 1:
        middle = (low + high) // 2
        fits = sum(_plan(rates, middle, answering, settings).minutes) <= minutes
        low, high = (middle, high) if fits else (low, middle)
    return _plan(rates, low, answering, settings)


def _plan(rates: Rates, count: int, answering: RegenerateConfig, settings: TrainConfig) -> Plan:
    length = sum(_expected(answering.length(index)) for index in range(1000)) / 1000
    tokens = count * length
    views = settings.for_data(1, int(tokens)).views
    first = settings.align_after * views
    seconds = (
        tokens / rates.answers,
        (tokens + count * rates.prompt_tokens) / rates.features,
        first / rates.training + (views - first) / rates.aligned,
    )
    return Plan(count, length, views, (seconds[0] / 60, seconds[1] / 60, seconds[2] / 60))


def _expected(longest: int) -> float:
    return _OF_SHORT * min(longest, _SHORT) + _OF_LONG * max(longest - _SHORT, 0)


def measure_rates(
    target: Target, prompts: Sequence[Prompt], answering: RegenerateConfig, settings: TrainConfig
) -> Rates:
    """Answer a few prompts shortly, compute their features, and train for a few steps. Nothing is kept."""
    if target.tokenizer is None:
        raise ValueError("the target has no tokenizer, so it cannot answer prompts")
    some = evenly(prompts, min(answering.batch, _TRIAL_PROMPTS))
    encoded = [encode_prompt(target.tokenizer, prompt.turns[:1], answering.thinking) for prompt in some]
    encoded = [tokens[: answering.max_prompt_tokens] for tokens in encoded]
    engine, sampling = Engine(target, VanillaDrafter()), SamplingParams(temperature=1.0)
    start = time.monotonic()
    texts = engine.complete(encoded, sampling, StopParams(_TRIAL_TOKENS))
    made = time.monotonic()
    sequences = [
        TokenSequence([*tokens, *text], [False] * len(tokens) + [True] * len(text))
        for tokens, text in zip(encoded, texts, strict=True)
    ]
    layers = layer_ids(settings, target)
    examples = [each for _, each in stream_examples(target, sequences, layer_ids=layers)]
    extracted = time.monotonic()
    trained, cpu = list[float](), target.device.type == "cpu"
    for passes in (1, settings.alignment_steps):
        batch = settings.for_data(target.hidden_size, 1).positions
        share = sum(len(each.queries()) for each in examples) / sum(each.pairs for each in examples)
        views = max(int(_TRIAL_STEPS * batch * share), 1)
        config = replace(
            settings, views=views, alignment_steps=passes, align_after=0.0, initialisation="random",
            log_every=views, evaluate_every=views, checkpoint_every=views,
        )  # fmt: skip
        with TemporaryDirectory() as folder:
            sizes, weights = head_config(settings, target), TargetWeights.of(target)
            run = Trainer(config, sizes, weights, examples, [], Path(folder), quiet=True, on_cpu=cpu)
            trained.append(views / max(run.run()["seconds"], 1e-9))
    tokens = sum(len(sequence.tokens) for sequence in sequences)
    new = sum(len(text) for text in texts)
    return Rates(
        new / max(made - start, 1e-9),
        tokens / max(extracted - made, 1e-9),
        trained[0],
        trained[1],
        (tokens - new) / len(sequences),
    )
