"""How answers are made and heads are trained. Owns settings, their defaults and their checks; knows nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
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


_ABOVE, _LEAST, _SHARE, _BELOW_ONE = "above 0", "0 or above", "between 0 and 1", "0 or above and below 1"
_BOUNDS: dict[str, Callable[[float], bool]] = {
    _ABOVE: lambda value: 0 < value < math.inf,
    _LEAST: lambda value: 0 <= value < math.inf,
    _SHARE: lambda value: 0 <= value <= 1,
    _BELOW_ONE: lambda value: 0 <= value < 1,
}


def _flag(default: Any, words: str, allowed: str | tuple[str, ...] = "") -> Any:
    """A field that commands have as a flag: the words that `--help` says of it, and its bound or choices."""
    return field(default=default, metadata={"help": words, "allowed": allowed})


def _check(config: RegenerateConfig | TrainConfig, where: str) -> None:
    """Raises ValueError for a value that its field does not allow; None, where a field has it, is always allowed."""
    for each in fields(config):
        value, allowed = getattr(config, each.name), each.metadata["allowed"]
        if isinstance(allowed, tuple) and value not in allowed:
            raise ValueError(f"{each.name}={value!r} is not allowed in {where}: give {', '.join(allowed)}")
        if isinstance(allowed, str) and allowed and value is not None and not _BOUNDS[allowed](value):
            raise ValueError(f"{each.name}={value} is not allowed in {where}: give a value {allowed}")


@dataclass(frozen=True)
class RegenerateConfig:
    """How answers are made."""

    batch: int = _flag(32, "Answers in the making at a time.", _ABOVE)
    max_new_tokens: int = _flag(256, "Of an answer.", _ABOVE)
    max_prompt_tokens: int = _flag(1024, "Longer prompts are left out.", _ABOVE)
    temperatures: str = _flag("0:0.5,0.7:0.25,1:0.25", "Temperatures and their shares; each prompt draws one.")
    seed: int = _flag(0, "Of all draws.")
    turns: int = _flag(1, "User turns of a prompt that are answered, at most.", _ABOVE)
    thinking: bool | None = _flag(None, "The template's enable_thinking (Qwen3); by default the template's choice.")
    shards: Path | None = _flag(None, "Also store features in this folder.")  # noqa: RUF009 - a field
    topk: int = _flag(16, "The teacher's best tokens kept per position.", _ABOVE)
    max_gb: float = _flag(20.0, "Most that shards may take.", _ABOVE)

    def __post_init__(self) -> None:
        _check(self, "regeneration")
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

    views: int = _flag(10_000_000, "Length of the run: supervised positions seen, each epoch's anew.", _ABOVE)
    head: str = _flag("feat-extrapolator", "EAGLE-1/2's head, or eagle3, or medusa.", KINDS)
    layers: int = _flag(
        1, "Decoder layers of the head, or residual blocks of each Medusa head. Others load one.", _ABOVE
    )
    medusa_heads: int = _flag(3, "Tokens that Medusa heads draft ahead, one head each.", _ABOVE)
    inputs: str = _flag("feature+shifted-token", "Or feature+token, feature, token: ablations of the pairs.", INPUTS)
    fc_norm: bool = _flag(False, "Norm each captured state in front of an Eagle3Head's fc (EAGLE-3.1).")
    markov_rank: int = _flag(0, "Rank of a previous-token bias on the draft's logits; 0 is none.", _LEAST)
    optimizer: str = _flag("adamw", "Or muon: fewer views for the same loss.", ("adamw", "muon"))
    learning_rate: float = _flag(2e-3, "Its peak, after the warm-up.", _ABOVE)
    final_learning_rate: float = _flag(0.02, "Where the cosine ends, as a share of the learning rate.", _SHARE)
    warmup: float = _flag(
        0.05, "Share of the run, but at least 100,000 views or a quarter of it; 0 is none.", _BELOW_ONE
    )
    weight_decay: float = _flag(0.01, "Decoupled from the gradient.", _LEAST)
    beta1: float = _flag(0.9, "Of AdamW.", _BELOW_ONE)
    beta2: float = _flag(0.95, "Of AdamW.", _BELOW_ONE)
    clip: float = _flag(1.0, "Largest gradient norm.", _ABOVE)
    ce_weight: float = _flag(1.0, "Of the soft cross-entropy against the teacher's best tokens.", _LEAST)
    teacher_top: int = _flag(
        0, "Distil only the teacher's K best tokens, renormalised; 0 is all that are stored.", _LEAST
    )
    rejected_weight: float = _flag(1.0, "Of views whose first choice the target would reject; 1 is as others.", _ABOVE)
    lk_after: float = _flag(1.0, "Share of the run after which acceptance joins the loss (LK); 1 is never.", _SHARE)
    lk_sharpness: float = _flag(3.0, "How fast cross-entropy gives way as acceptance grows.", _LEAST)
    feature_weight: float = _flag(0.1, "Of the Smooth L1 on features, in units of each dimension's rms.", _LEAST)
    draft_vocab: int = _flag(8192, "Tokens that the head drafts: those the target likes most.", _ABOVE)
    batch_tokens: int | None = _flag(
        None, "Positions a batch, prompt ones included; by default 1,536, muon 6 x hidden size.", _ABOVE
    )
    accumulate: int = _flag(1, "Batches a step and process.", _ABOVE)
    shard: bool = _flag(False, "Shard parameters and optimiser over the processes (FSDP).")
    mixed_precision: str = _flag(
        "no", "no or bf16: of products, under autocast; slow where the device has none.", ("no", "bf16")
    )
    initialisation: str = _flag(
        "auto",
        "last-layer (the target's own), random, or auto: the first if it fits.",
        ("auto", "last-layer", "random"),
    )
    output_init: float = _flag(0.1, "Scale of fc, o_proj and down_proj at a random start.", _ABOVE)
    feature_noise: float = _flag(0.0, "Width of uniform noise on features, in units of each dimension's rms.", _LEAST)
    ema: float = _flag(0.0, "Decay of the weight average that is evaluated and exported; 0 is off.", _BELOW_ONE)
    matmul_precision: str = _flag(
        "medium", "Of fp32 products: highest, high or medium, as torch has it.", ("highest", "high", "medium")
    )
    alignment_steps: int = _flag(1, "Passes in which the head reads its own features (HASS); 1 is none.", _ABOVE)
    align_after: float = _flag(0.0, "Share of the run with one pass only, before alignment begins.", _SHARE)
    step_decay: float = _flag(0.8, "Weight of pass s is this to the power of s.", _ABOVE)
    log_every: int = _flag(50_000, "Views between log lines.", _ABOVE)
    evaluate_every: int = _flag(500_000, "Views between evaluations.", _ABOVE)
    checkpoint_every: int = _flag(250_000, "Views between checkpoints.", _ABOVE)
    patience: int = _flag(0, "End after so many evaluations without a better tau; 0 is never.", _LEAST)
    until_tau: float = _flag(0.0, "End once an evaluation measures this tau; 0 is never.", _LEAST)
    seed: int = _flag(0, "Of weights, order and noise.", _LEAST)

    def __post_init__(self) -> None:
        _check(self, "training")
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
        if not self.ce_weight + self.feature_weight > 0:
            raise ValueError("ce_weight=0 and feature_weight=0 leave nothing to learn: give one of them above 0")

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
