"""The decoders a bench compares, with one method and one clock.

Owns how one decoder answers one prompt and what is timed. Prefill ends when the first token is there, for every arm:
decode time is from that moment to the end of the call, and the first token is not counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.factory import make_drafter
from haast.drafters.medusa import MedusaDrafter
from haast.engine.engine import PREFILL_CHUNK, Engine, Stats, StopParams
from haast.engine.rules import rule_named
from haast.target.target import Target

HEADED = ("eagle", "eagle+suffix")  # these draft with a head
# Decoders that are another one's drafts judged by another rule than sample-and-match; the small model's are drawn.
RULED = {
    "medusa-typical": ("medusa", "typical"),
    "small-model-rejection": ("small-model", "rejection"),
    "small-model-block": ("small-model", "block"),
}
HF_SKIPPED = "hf draws its own random numbers, so its text cannot be compared there"
KNOWN = ("vanilla", *HEADED, "medusa", "small-model", *RULED, "lookahead", "lookup", "suffix", "hf")


@dataclass(frozen=True)
class DecoderRun:
    """One prompt answered once."""

    tokens: tuple[int, ...]
    ms_prefill: float  # until the first token
    ms_decode: float  # from there to the end
    stats: Stats | None  # None for a decoder outside the engine
    peak_rss_mb: float = 0.0  # of the process meanwhile, where somebody looked


class Decoder(ABC):
    """One decoder."""

    name: str

    @abstractmethod
    def run(self, prompt: Sequence[int], max_new_tokens: int) -> DecoderRun:
        """Answer `prompt` (token ids)."""


class EngineDecoder(Decoder):
    """Vanilla or drafted decoding in Haast's engine."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        sampling: SamplingParams,
        eos: Sequence[int],
        name: str | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        """`name` is of `KNOWN` and says the acceptance rule; None is the drafter's own, with sample-and-match."""
        self.name, self.nodes = name or drafter.name, drafter.nodes
        self._engine = Engine(target, drafter, rule_named(rule_of(self.name)), prefill_chunk)
        self._sampling, self._eos = sampling, tuple(eos)

    def run(self, prompt: Sequence[int], max_new_tokens: int) -> DecoderRun:
        stats, tokens = Stats(), list[int]()
        self._engine.target.pool.clear()  # the whole prompt is computed, whoever answered one like it before
        begun = first = perf_counter()
        for emission in self._engine.run([prompt], self._sampling, StopParams(max_new_tokens, self._eos), stats):
            if not tokens:
                first = perf_counter()
            tokens.extend(emission.tokens)
        end = perf_counter()
        return DecoderRun(tuple(tokens), 1e3 * (first - begun), 1e3 * (end - first), stats)


class StockDecoder(Decoder):
    """`model.generate` of transformers, greedy, its own instance of the model with its own attention."""

    name = "hf"

    def __init__(self, model: PreTrainedModel, eos: Sequence[int]) -> None:
        self._model = model.eval()  # type: ignore[no-untyped-call]
        self._eos = list(eos)

    @torch.inference_mode()
    def run(self, prompt: Sequence[int], max_new_tokens: int) -> DecoderRun:
        ids = torch.tensor([list(prompt)], device=self._model.device)
        self._model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self._eos or None,
            pad_token_id=self._eos[0] if self._eos else 0,
        )
        watch = _FirstToken()
        generate: Any = self._model.generate
        begun = perf_counter()
        output = generate(ids, attention_mask=torch.ones_like(ids), streamer=watch)
        end = perf_counter()
        tokens = tuple(output[0, ids.shape[1] :].tolist())
        return DecoderRun(tokens, 1e3 * (watch.first - begun), 1e3 * (end - watch.first), None)


class _FirstToken(BaseStreamer):
    """Notes when the first new token arrives; the call before it hands over the prompt."""

    def __init__(self) -> None:
        self.first, self._calls = 0.0, 0

    def put(self, value: Tensor) -> None:
        self._calls += 1
        if self._calls == 2:
            self.first = perf_counter()

    def end(self) -> None:
        return


@dataclass(frozen=True)
class Parts:
    """What decoders draft with that have a head or a model of their own, and how EAGLE is to draft."""

    eagle: EagleDrafter | None = None
    medusa: MedusaDrafter | None = None
    small: Target | None = None
    shaped: bool = False  # whether EAGLE's shape was asked for, and is to be drafted as it is
    calibration: str | Path = "auto"  # of EAGLE's drafts, see `make_drafter`


def drafter_for(
    name: str, target: Target, parts: Parts | None = None, sampling: SamplingParams | None = None
) -> Drafter:
    """The drafter of an engine decoder. EAGLE drafts what pays, as users get it; others what they can.

    Args:
        name: one of `KNOWN`, not hf.
        target: what it drafts for.
        parts: with those that `name` needs.
        sampling: the distribution, where drafts are drawn.
    """
    base, parts = base_of(name), parts or Parts()
    if base in HEADED:
        assert parts.eagle is not None, "checked with the names"
        shape = parts.eagle.shape if parts.shaped else None
        return make_drafter(base, target, parts.eagle, shape=shape, calibration=parts.calibration)
    drawn = sampling if name in RULED else None
    return make_drafter(base, target, parts.medusa, small=parts.small, calibration="off", sampling=drawn)


def base_of(name: str) -> str:
    """The decoder whose drafts a decoder judges: itself, but for those in `RULED`."""
    return RULED.get(name, (name, ""))[0]


def rule_of(name: str) -> str:
    """The acceptance rule of a decoder."""
    return RULED.get(name, ("", "match"))[1]


def lossy(name: str) -> bool:
    """Whether a decoder may follow another distribution than the target's."""
    rule = rule_named(rule_of(name))
    return rule is not None and rule.lossy


def own_text(name: str, temperature: float) -> bool:
    """Whether a decoder's text is not bound to vanilla's for the same seed, so that a difference says nothing."""
    return rule_of(name) != "match" and temperature > 0


def check_decoders(
    names: str, head: bool, temperature: float, small: bool = False, medusa: bool = False
) -> tuple[str, ...]:
    """The decoders of a comma-separated list.

    Raises:
        ValueError: an empty list, an unknown or doubled name, a decoder without its head, or `hf` with sampling.
    """
    chosen = tuple(name.strip() for name in names.split(",") if name.strip())
    if not chosen:
        raise ValueError(f"decoders={names!r} names none: choose some of {','.join(KNOWN)}")
    unknown = [name for name in chosen if name not in KNOWN]
    if unknown:
        raise ValueError(f"unknown decoders {unknown}: choose some of {','.join(KNOWN)}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"decoders={names!r} names one twice: name each once")
    headless = [name for name in chosen if name in HEADED]
    if headless and not head:
        raise ValueError(f"decoder {headless[0]!r} needs a head: give --head, or leave it out of --decoders")
    bases = {base_of(name) for name in chosen}
    for base, given, option in (("small-model", small, "--small-model NAME"), ("medusa", medusa, "--medusa-head DIR")):
        if (base in bases) != given:
            raise ValueError(f"decoder {base!r} and {option} go together: give both, or neither")
    if "hf" in chosen and temperature > 0:
        raise ValueError(
            f"decoder 'hf' draws its own random numbers, so its text cannot be compared at temperature={temperature}: "
            f"use temperature 0, or leave hf out of --decoders"
        )
    return chosen
