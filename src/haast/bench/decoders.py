"""The decoders that a bench compares, behind one interface and one timer.

Owns how a decoder answers one prompt and what is timed. For every decoder, prefill ends at the first token: decode time
runs from that moment to the end of the call, and the first token is not a decoded token.
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

HEADED = ("eagle", "eagle+suffix", "block", "block+suffix")  # decoders that draft with an EAGLE or block head
# Decoder -> (the decoder whose drafts it verifies, its acceptance rule). All others use sample-and-match. The drafts of
# the small model are sampled here, because its rules need draft probabilities.
RULE_VARIANTS = {
    "medusa-typical": ("medusa", "typical"),
    "small-model-rejection": ("small-model", "rejection"),
    "small-model-block": ("small-model", "block"),
}
HF_SKIPPED = "hf draws its own random numbers, so its text cannot be compared there"
DECODERS = ("vanilla", *HEADED, "medusa", "small-model", *RULE_VARIANTS, "lookahead", "lookup", "suffix", "hf")


@dataclass(frozen=True)
class DecoderRun:
    """One answer of one decoder, with its times and counts."""

    tokens: tuple[int, ...]
    ms_prefill: float  # until the first token
    ms_decode: float  # from there to the end
    stats: Stats | None  # None for a decoder outside the engine
    peak_rss_mb: float = 0.0  # peak of the process during the call; 0 if not measured


class Decoder(ABC):
    """Answers one prompt at a time."""

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
        """`name`, one of `DECODERS`, chooses the acceptance rule; None: the drafter's name and sample-and-match."""
        self.name, self.nodes = name or drafter.name, drafter.nodes
        self._engine = Engine(target, drafter, rule_named(rule_of(self.name)), prefill_chunk)
        self._sampling, self._eos = sampling, tuple(eos)

    def run(self, prompt: Sequence[int], max_new_tokens: int) -> DecoderRun:
        stats, tokens = Stats(), list[int]()
        self._engine.target.pool.clear()  # no prefix of an earlier call may shorten the prefill
        begin = first = perf_counter()
        for emission in self._engine.run([prompt], self._sampling, StopParams(max_new_tokens, self._eos), stats):
            if not tokens:
                first = perf_counter()
            tokens.extend(emission.tokens)
        end = perf_counter()
        return DecoderRun(tuple(tokens), 1e3 * (first - begin), 1e3 * (end - first), stats)


class StockDecoder(Decoder):
    """Greedy `model.generate` of transformers, on a separate copy of the model with its stock attention."""

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
        streamer = _FirstToken()
        generate: Any = self._model.generate
        begin = perf_counter()
        output = generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer)
        end = perf_counter()
        tokens = tuple(output[0, ids.shape[1] :].tolist())
        return DecoderRun(tokens, 1e3 * (streamer.first - begin), 1e3 * (end - streamer.first), None)


class _FirstToken(BaseStreamer):
    """Records the time of the first new token. The first call of `put` passes the prompt, the second that token."""

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
    """The heads and models that decoders draft with, and EAGLE's draft settings."""

    eagle: EagleDrafter | None = None
    medusa: MedusaDrafter | None = None
    small: Target | None = None
    shaped: bool = False  # the user chose EAGLE's shape: draft exactly that, without calibration
    calibration: str | Path = "auto"  # for EAGLE, see `make_drafter`


def drafter_for(
    name: str, target: Target, parts: Parts | None = None, sampling: SamplingParams | None = None
) -> Drafter:
    """The drafter of an engine decoder. EAGLE uses its calibration, as it does for users; the others draft full trees.

    Args:
        name: one of `DECODERS` except hf.
        target: the target to draft for.
        parts: must hold what `name` drafts with.
        sampling: the distribution to sample drafts from, for the decoders in `RULE_VARIANTS`.
    """
    base, parts = base_of(name), parts or Parts()
    if base in HEADED:
        assert parts.eagle is not None, "checked with the names"
        shape = parts.eagle.shape if parts.shaped else None
        return make_drafter(base, target, parts.eagle, shape=shape, calibration=parts.calibration)
    draft_sampling = sampling if name in RULE_VARIANTS else None
    return make_drafter(base, target, parts.medusa, small=parts.small, calibration="off", sampling=draft_sampling)


def base_of(name: str) -> str:
    """The decoder whose drafts `name` verifies: itself, except for those in `RULE_VARIANTS`."""
    return RULE_VARIANTS.get(name, (name, ""))[0]


def rule_of(name: str) -> str:
    """The acceptance rule of a decoder."""
    return RULE_VARIANTS.get(name, ("", "match"))[1]


def lossy(name: str) -> bool:
    """Whether a decoder may generate from another distribution than the target's."""
    rule = rule_named(rule_of(name))
    return rule is not None and rule.lossy


def independent_text(name: str, temperature: float) -> bool:
    """Whether a decoder may differ from vanilla for the same seed, so that its texts are not compared."""
    return rule_of(name) != "match" and temperature > 0


def check_decoders(
    names: str, head: bool, temperature: float, small: bool = False, medusa: bool = False
) -> tuple[str, ...]:
    """The decoders of a comma-separated list.

    Raises:
        ValueError: an empty list, an unknown or repeated name, a decoder without its head, or `hf` with sampling.
    """
    chosen = tuple(name.strip() for name in names.split(",") if name.strip())
    if not chosen:
        raise ValueError(f"decoders={names!r} names none: choose from {','.join(DECODERS)}")
    unknown = [name for name in chosen if name not in DECODERS]
    if unknown:
        raise ValueError(f"unknown decoders {unknown}: choose from {','.join(DECODERS)}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"decoders={names!r} names a decoder twice: name each once")
    headless = [name for name in chosen if name in HEADED]
    if headless and not head:
        raise ValueError(f"decoder {headless[0]!r} needs a head: give --head, or leave it out of --decoders")
    bases = {base_of(name) for name in chosen}
    for base, present, option in (
        ("small-model", small, "--small-model NAME"),
        ("medusa", medusa, "--medusa-head DIR"),
    ):
        if (base in bases) != present:
            raise ValueError(f"decoder {base!r} and {option} go together: give both, or neither")
    if "hf" in chosen and temperature > 0:
        raise ValueError(
            f"decoder 'hf' draws its own random numbers, so its text cannot be compared at temperature={temperature}: "
            f"use temperature 0, or leave hf out of --decoders"
        )
    return chosen
