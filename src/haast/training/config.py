"""How answers are made and heads are trained. Owns settings, their defaults and their checks; knows nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from haast.heads import INPUTS, KINDS

# Views, at most a quarter of the run. In the first hundred steps Adam's steps all point one way, and with the large
# dimensions of the LM head's input a fast start throws the logits far off (measured: CE 18 instead of 8).
_LEAST_WARMUP = 100_000

_TEMPERATURE_DRAW = 2**40  # a position no text reaches: the draw that picks an answer's temperature

# Positions a batch where none are given. Muon's work grows with the cube of the hidden size, a batch's with its square
# and the positions: from 6 for each hidden dimension on, at most a quarter of a step is Muon's (a test counts it).
# More is not better: the same views are fewer steps.
_BATCH, _BATCH_BY_SIZE = 1536, 6


def _setting(default: Any, words: str) -> Any:
    """A field with the words that `--help` says of it."""
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class RegenerateConfig:
    """How answers are made."""

    batch: int = _setting(32, "Answers in the making at a time.")
    max_new_tokens: int = _setting(256, "Of an answer.")
    max_prompt_tokens: int = _setting(1024, "Longer prompts are left out.")
    temperatures: str = _setting("0:0.5,0.7:0.25,1:0.25", "Temperatures and their shares; each prompt draws one.")
    seed: int = _setting(0, "Of all draws.")
    turns: int = _setting(1, "User turns of a prompt that are answered, at most.")
    thinking: bool | None = _setting(None, "The template's enable_thinking (Qwen3); by default the template's choice.")
    shards: Path | None = _setting(None, "Also store features in this folder.")  # noqa: RUF009 - a field
    topk: int = _setting(16, "The teacher's best tokens kept per position.")
    max_gb: float = _setting(20.0, "Most that shards may take.")

    def __post_init__(self) -> None:
        for name in ("batch", "max_new_tokens", "max_prompt_tokens", "topk", "max_gb", "turns"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed in regeneration: give a value above 0")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is not allowed: give 0 to 2**63 - 1")
        try:
            shares = self._shares()
        except ValueError as error:
            raise ValueError(f"temperatures={self.temperatures!r} is not of the form 0:0.5,0.7:0.25,1:0.25") from error
        if not all(t >= 0 and math.isfinite(t) and 0 < share < math.inf for t, share in shares):
            raise ValueError(
                f"temperatures={self.temperatures!r} is not allowed: give pairs of a temperature of 0 or above and a "
                f"share above 0"
            )

    def _shares(self) -> list[tuple[float, float]]:
        pairs = [pair.split(":") for pair in self.temperatures.split(",")]
        return [(float(temperature), float(share)) for temperature, share in pairs]

    def temperature(self, index: int) -> float:
        """The temperature of prompt `index`, the same in all its turns."""
        from haast.sampling import keyed_uniform  # which imports torch; settings are read before that

        shares = self._shares()
        point = keyed_uniform(self.seed, index, _TEMPERATURE_DRAW) * sum(share for _, share in shares)
        for temperature, share in shares:
            if point < share:
                return temperature
            point -= share
        return shares[-1][0]


@dataclass(frozen=True)
class TrainConfig:
    """How a head is trained. A *view* is one supervised position seen once; `views` is the length of the whole run."""

    views: int = _setting(10_000_000, "Length of the run: supervised positions seen, each epoch's anew.")
    head: str = _setting("feat-extrapolator", "EAGLE-1/2's head, or eagle3, or medusa.")
    layers: int = _setting(1, "Decoder layers of the head, or residual blocks of each Medusa head. Others load one.")
    medusa_heads: int = _setting(3, "Tokens that Medusa heads draft ahead, one head each.")
    inputs: str = _setting("feature+shifted-token", "Or feature+token, feature, token: ablations of the pairs.")
    fc_norm: bool = _setting(False, "Norm each captured state in front of an Eagle3Head's fc (EAGLE-3.1).")
    markov_rank: int = _setting(0, "Rank of a previous-token bias on the draft's logits; 0 is none.")
    optimizer: str = _setting("adamw", "Or muon: fewer views for the same loss.")
    learning_rate: float = _setting(2e-3, "Its peak, after the warm-up.")
    final_learning_rate: float = _setting(0.02, "Where the cosine ends, as a share of the learning rate.")
    warmup: float = _setting(0.05, "Share of the run, but at least 100,000 views or a quarter of it; 0 is none.")
    weight_decay: float = _setting(0.01, "Decoupled from the gradient.")
    beta1: float = _setting(0.9, "Of AdamW.")
    beta2: float = _setting(0.95, "Of AdamW.")
    clip: float = _setting(1.0, "Largest gradient norm.")
    ce_weight: float = _setting(1.0, "Of the soft cross-entropy against the teacher's best tokens.")
    teacher_top: int = _setting(0, "Distil only the teacher's K best tokens, renormalised; 0 is all that are stored.")
    rejected_weight: float = _setting(1.0, "Of views whose first choice the target would reject; 1 is as others.")
    lk_after: float = _setting(1.0, "Share of the run after which acceptance joins the loss (LK); 1 is never.")
    lk_sharpness: float = _setting(3.0, "How fast cross-entropy gives way as acceptance grows.")
    feature_weight: float = _setting(0.1, "Of the Smooth L1 on features, in units of each dimension's rms.")
    draft_vocab: int = _setting(8192, "Tokens that the head drafts: those the target likes most.")
    batch_tokens: int | None = _setting(
        None, "Positions a batch, prompt ones included; by default 1,536, muon 6 x hidden size."
    )
    accumulate: int = _setting(1, "Batches a step and process.")
    shard: bool = _setting(False, "Shard parameters and optimiser over the processes (FSDP).")
    mixed_precision: str = _setting("no", "no or bf16: of products, under autocast; slow where the device has none.")
    initialisation: str = _setting("auto", "last-layer (the target's own), random, or auto: the first if it fits.")
    output_init: float = _setting(0.1, "Scale of fc, o_proj and down_proj at a random start.")
    feature_noise: float = _setting(0.0, "Width of uniform noise on features, in units of each dimension's rms.")
    ema: float = _setting(0.0, "Decay of the weight average that is evaluated and exported; 0 is off.")
    matmul_precision: str = _setting("medium", "Of fp32 products: highest, high or medium, as torch has it.")
    alignment_steps: int = _setting(1, "Passes in which the head reads its own features (HASS); 1 is none.")
    align_after: float = _setting(0.0, "Share of the run with one pass only, before alignment begins.")
    step_decay: float = _setting(0.8, "Weight of pass s is this to the power of s.")
    log_every: int = _setting(50_000, "Views between log lines.")
    evaluate_every: int = _setting(500_000, "Views between evaluations.")
    checkpoint_every: int = _setting(250_000, "Views between checkpoints.")
    patience: int = _setting(0, "End after so many evaluations without a better tau; 0 is never.")
    until_tau: float = _setting(0.0, "End once an evaluation measures this tau; 0 is never.")
    seed: int = _setting(0, "Of weights, order and noise.")

    def __post_init__(self) -> None:
        above_zero = (
            "views layers medusa_heads learning_rate clip draft_vocab batch_tokens accumulate output_init "
            "alignment_steps step_decay rejected_weight log_every evaluate_every checkpoint_every"
        )
        for name in above_zero.split():
            self._require(name, getattr(self, name) is None or getattr(self, name) > 0, "above 0")
        not_below_zero = (
            "weight_decay ce_weight feature_weight feature_noise seed markov_rank teacher_top lk_sharpness patience "
            "until_tau"
        )
        for name in not_below_zero.split():
            self._require(name, getattr(self, name) >= 0, "0 or above")
        for name in ("warmup", "beta1", "beta2", "ema"):
            self._require(name, 0 <= getattr(self, name) < 1, "0 or above and below 1")
        self._require_one_of("initialisation", ("auto", "last-layer", "random"))
        self._require_one_of("optimizer", ("adamw", "muon"))
        self._require_one_of("matmul_precision", ("highest", "high", "medium"))
        self._require_one_of("mixed_precision", ("no", "bf16"))
        self._require_one_of("head", KINDS)
        self._require_one_of("inputs", INPUTS)
        for name in ("final_learning_rate", "lk_after", "align_after"):
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        if self.head != KINDS[0] and not self.ce_weight:
            raise ValueError(f"ce_weight=0 leaves head={self.head!r} nothing to learn: it has no feature loss")
        plain = self.head == KINDS[0] and self.layers == 1 and not self.markov_rank and self.inputs == INPUTS[0]
        if self.initialisation == "last-layer" and not plain:
            raise ValueError(
                "initialisation='last-layer' fits a FeatExtrapolator of one layer without a Markov bias, on EAGLE's "
                "own inputs: use 'auto'"
            )
        if self.shard and (self.optimizer == "muon" or self.ema):
            raise ValueError("shard=True splits parameters that optimizer='muon' and ema need whole: use adamw, ema=0")
        if self.head != KINDS[0] and self.inputs != INPUTS[0]:
            raise ValueError(f"inputs={self.inputs!r} is an ablation of head='feat-extrapolator', not of {self.head!r}")
        eagles = {name: getattr(self, name) for name in ("alignment_steps", "markov_rank", "teacher_top")}
        if self.head == "medusa" and tuple(eagles.values()) != (1, 0, 0):
            raise ValueError(f"head='medusa' has none of EAGLE's options, so leave out {', '.join(eagles)}: {eagles}")
        if self.head != "eagle3" and self.fc_norm:
            raise ValueError("fc_norm=True is an option of head='eagle3': a FeatExtrapolator's features are normed")
        self._require("ce_weight", self.ce_weight + self.feature_weight > 0, "above 0, or feature_weight above 0")

    def _require(self, name: str, ok: bool, wanted: str) -> None:
        value = getattr(self, name)
        if not ok or not (value is None or math.isfinite(value)):
            raise ValueError(f"{name}={value} is not allowed in training: give a value {wanted}")

    def _require_one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name}={getattr(self, name)!r} is not allowed in training: give {', '.join(allowed)}")

    def settled(self, hidden_size: int) -> TrainConfig:
        """With the default of `batch_tokens` for a head of this size, where it was not given."""
        batch = _BATCH_BY_SIZE * hidden_size if self.optimizer == "muon" else _BATCH
        return self if self.batch_tokens is not None else replace(self, batch_tokens=batch)

    @property
    def positions(self) -> int:
        """`batch_tokens` of settled settings."""
        if self.batch_tokens is None:
            raise ValueError("batch_tokens=None says no number yet: `settled(hidden_size)` does")
        return self.batch_tokens

    def passes_at(self, views: int) -> int:
        """Alignment steps once they have begun; one before."""
        return self.alignment_steps if views >= self.align_after * self.views else 1

    def sharpness_at(self, views: int) -> float | None:
        """Of the LK mix once it has begun; None is cross-entropy alone."""
        return self.lk_sharpness if views >= self.lk_after * self.views and self.lk_after < 1 else None

    def learning_rate_at(self, views: int) -> float:
        """Linear warm-up, then a cosine down to final_learning_rate * learning_rate at the end of the run."""
        done = min(views / self.views, 1.0)
        warmup = max(self.warmup, min(_LEAST_WARMUP / self.views, 0.25) if self.warmup else 0.0)
        if done < warmup:
            return self.learning_rate * max(done / warmup, 0.02)
        angle = math.pi * (done - warmup) / (1 - warmup)
        floor = self.final_learning_rate
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(angle)))
