"""Settings of answer generation and of training: fields, defaults and checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from haast.errors import check_at_least
from haast.heads import INPUTS, KINDS

# Supervised tokens, at most a quarter of the run. In the first hundred steps Adam's steps all point one way. The LM
# head's input has large dimensions, so a high learning rate there makes the logits diverge (measured: CE 18 instead
# of 8).
_MIN_WARMUP = 100_000

# Position keys, beyond any text, of the random draws that pick an answer's temperature and its maximum length.
_TEMPERATURE_POSITION, _LENGTH_POSITION = 2**40, 2**40 + 1

# Default length of a run: six epochs, within bounds. On little data a head needs more epochs to learn anything, and a
# run of days should be asked for.
_EPOCHS, _FEWEST_VIEWS, _MOST_VIEWS = 6, 500_000, 50_000_000

# The recipe, by optimiser: (learning rate, weight decay). It is measured in docs/training.md.
_RATES = {"muon": (8e-4, 0.1), "adamw": (2e-3, 0.01)}

# Default positions per batch. Muon's cost grows with the cube of the hidden size, a batch's with its square times the
# positions: with 6 positions per hidden dimension, at most a quarter of a step is spent in Muon (a test checks this).
# A larger batch is not better: fewer steps for the same number of supervised tokens.
_BATCH, _BATCH_BY_SIZE = 1536, 6

_ONE_PASS = ("medusa", "block")  # heads that never read their own states

_ABOVE, _NOT_NEGATIVE, _SHARE, _BELOW_ONE = "above 0", "0 or above", "between 0 and 1", "0 or above and below 1"
_BOUNDS: dict[str, Callable[[float], bool]] = {
    _ABOVE: lambda value: 0 < value < math.inf,
    _NOT_NEGATIVE: lambda value: 0 <= value < math.inf,
    _SHARE: lambda value: 0 <= value <= 1,
    _BELOW_ONE: lambda value: 0 <= value < 1,
}


def _option(default: Any, description: str, allowed: str | tuple[str, ...] = "") -> Any:
    """A field that is also a CLI flag, with its `--help` text and its bound or choices."""
    return field(default=default, metadata={"help": description, "allowed": allowed})


def _check(config: RegenerateConfig | TrainConfig, where: str) -> None:
    """Raise ValueError for a value outside its field's bound or choices; None is allowed where a field has a bound."""
    for each in fields(config):
        value, allowed = getattr(config, each.name), each.metadata["allowed"]
        if isinstance(allowed, tuple) and value not in allowed:
            raise ValueError(f"{each.name}={value!r} is not allowed in {where}: give {', '.join(allowed)}")
        if isinstance(allowed, str) and allowed and value is not None and not _BOUNDS[allowed](value):
            raise ValueError(f"{each.name}={value} is not allowed in {where}: give a value {allowed}")


def _shares(text: str) -> list[tuple[float, float]]:
    """Pairs of a value and its share, from a text such as 0:0.5,1:0.5."""
    return [(float(value), float(share)) for value, share in (pair.split(":") for pair in text.split(","))]


@dataclass(frozen=True)
class RegenerateConfig:
    """How the target's answers are generated."""

    batch: int = _option(32, "Answers generated at a time.", _ABOVE)
    lengths: str = _option("256:0.9,1024:0.1", "Maximum lengths of answers and their shares; each prompt draws one.")
    max_new_tokens: int | None = _option(None, "One maximum length for all answers, instead of --lengths.", _ABOVE)
    max_prompt_tokens: int = _option(1024, "Longer prompts are left out.", _ABOVE)
    temperatures: str = _option("0:0.5,0.7:0.25,1:0.25", "Temperatures and their shares; each prompt draws one.")
    seed: int = _option(0, "Seed of sampling and of the choice of temperatures.")
    turns: int = _option(2, "Maximum number of user turns per prompt that are answered.", _ABOVE)
    answers: int | None = _option(None, "Number of answers, chosen by --mix; by default all prompts.", _ABOVE)
    mix: str = _option(
        "chat:3,coding:3,code:3,math:3,maths:3,extraction:3,multi-turn:3,*:1",
        "Weights of the prompts' categories; * is any other. 'file' keeps the order of the file.",
    )
    near_duplicates: str = _option("drop", "drop or keep prompts that say nearly the same.", ("drop", "keep"))
    loops: str = _option("cut", "cut ends an answer where it begins to repeat itself; or keep.", ("cut", "keep"))
    thinking: bool | None = _option(None, "The template's enable_thinking (Qwen3); by default the template's choice.")
    shards: Path | None = _option(None, "Also store features in this folder.")  # noqa: RUF009 - a field
    topk: int = _option(16, "Number of the teacher's best tokens stored per position.", _ABOVE)
    max_gb: float = _option(20.0, "Maximum size of all shards.", _ABOVE)

    def __post_init__(self) -> None:
        _check(self, "regeneration")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is not allowed: give 0 to 2**63 - 1")
        self._check_shares("temperatures", "0:0.5,0.7:0.25,1:0.25", "a temperature of 0 or above", 0.0)
        self._check_shares("lengths", "256:0.9,1024:0.1", "a length of 1 or above", 1.0)
        try:
            weights = self.weights() or {"*": 1.0}
        except ValueError as error:
            raise ValueError(f"mix={self.mix!r} is not of the form chat:3,coding:2,*:1, or 'file'") from error
        if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
            raise ValueError(f"mix={self.mix!r} is not allowed: give weights of 0 or above, and one above 0")

    def _check_shares(self, name: str, form: str, meaning: str, least: float) -> None:
        """Raise ValueError if the field `name` does not hold pairs of a value and its share."""
        text = getattr(self, name)
        try:
            shares = _shares(text)
        except ValueError as error:
            raise ValueError(f"{name}={text!r} is not of the form {form}") from error
        if not all(value >= least and math.isfinite(value) and 0 < share < math.inf for value, share in shares):
            raise ValueError(f"{name}={text!r} is not allowed: give pairs of {meaning} and a share above 0")

    def weights(self) -> dict[str, float] | None:
        """The weight of each category in the mix, `*` included; None keeps the order of the file."""
        if self.mix == "file":
            return None
        pairs = (pair.rpartition(":") for pair in self.mix.split(","))
        return {"*": 0.0, **{name.strip(): float(weight) for name, _, weight in pairs}}

    def temperature(self, index: int) -> float:
        """The temperature of prompt `index`, the same in all its turns."""
        return self._drawn(self.temperatures, index, _TEMPERATURE_POSITION)

    def length(self, index: int) -> int:
        """The maximum length of the answers to prompt `index`, in tokens."""
        return self.max_new_tokens or int(self._drawn(self.lengths, index, _LENGTH_POSITION))

    def _drawn(self, text: str, index: int, position: int) -> float:
        """The value that prompt `index` draws from pairs of values and shares."""
        from haast.sampling import keyed_uniform  # imports torch, which the CLI must not need to read settings

        shares = _shares(text)
        point = keyed_uniform(self.seed, index, position) * sum(share for _, share in shares)
        for value, share in shares:
            if point < share:
                return value
            point -= share
        return shares[-1][0]


@dataclass(frozen=True)
class TrainConfig:
    """How a head is trained. `views` is the length of the run: the number of supervised tokens, repeats included.

    The defaults are the recipe of docs/training.md. Where it depends on other settings the default is None, and the
    value is there after construction; `views` and `batch_tokens` follow from the data, see `for_data`.
    """

    views: int = _option(
        None,
        f"Length of the run: number of supervised tokens, repeats included; by default {_EPOCHS} epochs, within "
        f"{_FEWEST_VIEWS / 1e6:g} to {_MOST_VIEWS / 1e6:g} M.",
        _ABOVE,
    )
    head: str = _option(
        "feat-extrapolator",
        "EAGLE-1/2's head, or eagle3, medusa, block, or mtp, which is trained further from a head to start from.",
        KINDS,
    )
    layers: int = _option(
        1, "Decoder layers of the head, or residual blocks of each Medusa head. Other engines load one.", _ABOVE
    )
    medusa_heads: int = _option(3, "Number of Medusa heads; each drafts one token further ahead.", _ABOVE)
    block_size: int = _option(8, "Tokens that a block head drafts in one pass.", _ABOVE)
    block_layers: int = _option(2, "Decoder layers of a block head.", _ABOVE)
    block_markov_rank: int = _option(64, "Rank of a block head's Markov head; 0 turns it off.", _NOT_NEGATIVE)
    block_anchors: int = _option(128, "Blocks per sequence and step that a block head trains on.", _ABOVE)
    block_ce: float = _option(0.1, "Weight of cross-entropy in a block head's loss; the rest is L1's.", _SHARE)
    inputs: str = _option(
        "feature+shifted-token", "Input pairs; ablations are feature+token, feature and token.", INPUTS
    )
    context_layers: str | None = _option(
        None,
        "Layers of the target that a FeatExtrapolator also reads, as hidden_states indices such as 8,16,23,28; by "
        "default those of the head to start from, or none. Other engines cannot load such a head.",
    )
    fc_norm: bool = _option(False, "RMS norm on each captured state before an Eagle3Head's fc (EAGLE-3.1).")
    markov_rank: int = _option(0, "Rank of a previous-token bias on the draft logits; 0 turns it off.", _NOT_NEGATIVE)
    optimizer: str = _option(
        None,
        "muon, or adamw, which needs more supervised tokens for the same loss; by default muon, with --shard adamw.",
        ("adamw", "muon"),
    )
    learning_rate: float = _option(
        None, "Peak learning rate, after the warm-up; by default 8e-4, with adamw 2e-3.", _ABOVE
    )
    final_learning_rate: float = _option(
        0.02, "Learning rate at the end of the cosine, as a share of the peak.", _SHARE
    )
    warmup: float = _option(
        0.05, "Share of the run; at least 100,000 supervised tokens or a quarter of it; 0 turns it off.", _BELOW_ONE
    )
    weight_decay: float = _option(
        None, "Weight decay, decoupled from the gradient; by default 0.1, with adamw 0.01.", _NOT_NEGATIVE
    )
    beta1: float = _option(0.9, "AdamW's beta1.", _BELOW_ONE)
    beta2: float = _option(0.95, "AdamW's beta2.", _BELOW_ONE)
    clip: float = _option(1.0, "Maximum gradient norm.", _ABOVE)
    ce_weight: float = _option(
        1.0, "Weight of the soft cross-entropy against the teacher's best tokens.", _NOT_NEGATIVE
    )
    teacher_top: int = _option(
        0, "Distil only the teacher's K best tokens, renormalised; 0 uses all that are stored.", _NOT_NEGATIVE
    )
    rejected_weight: float = _option(
        1.0, "Loss weight of positions where the target would reject the head's first choice.", _ABOVE
    )
    lk_after: float = _option(1.0, "Share of the run after which acceptance joins the loss (LK); 1 is never.", _SHARE)
    lk_sharpness: float = _option(3.0, "How fast the weight of cross-entropy falls as acceptance grows.", _NOT_NEGATIVE)
    feature_weight: float = _option(
        0.1, "Weight of the Smooth L1 loss on features, in units of each dimension's RMS.", _NOT_NEGATIVE
    )
    draft_vocab: int = _option(8192, "Size of the draft vocabulary: the tokens most likely in the target.", _ABOVE)
    batch_tokens: int | None = _option(
        None, "Positions per batch, prompts included; by default 1,536, with muon 6 x hidden size.", _ABOVE
    )
    accumulate: int = _option(1, "Batches per step in each process.", _ABOVE)
    shard: bool = _option(False, "Shard parameters and optimiser state over the processes (FSDP).")
    mixed_precision: str = _option(
        None,
        "bf16 (matrix products under autocast; slow without units for it), no, or auto: bf16 on a CPU that has them "
        "(AVX512-BF16, AMX); by default auto, with --matmul-precision highest no.",
        ("auto", "no", "bf16"),
    )
    initialisation: str = _option(
        "auto",
        "last-layer (the target's), random, or auto: last-layer if the sizes fit.",
        ("auto", "last-layer", "random"),
    )
    output_init: float = _option(0.1, "Scale of fc, o_proj and down_proj in a random initialisation.", _ABOVE)
    feature_noise: float = _option(
        None,
        "Width of uniform noise on features, in units of each dimension's RMS; by default 0.2 for a FeatExtrapolator.",
        _NOT_NEGATIVE,
    )
    ema: float = _option(0.0, "Decay of the weight average that is evaluated and exported; 0 is off.", _BELOW_ONE)
    matmul_precision: str = _option(
        "medium", "Precision of fp32 matmuls, as in torch: highest, high or medium.", ("highest", "high", "medium")
    )
    alignment_steps: int = _option(
        None,
        "Number of training passes, of which all but the first read the head's own states (HASS); by default 2, for "
        "Medusa heads 1.",
        _ABOVE,
    )
    align_after: float = _option(
        None,
        "Share of the run with one pass only, before alignment begins; by default 0.7, with --alignment-steps 0.",
        _SHARE,
    )
    step_decay: float = _option(0.8, "Loss weight of pass s: this value to the power of s.", _ABOVE)
    reach_weights: bool = _option(
        False, "Of several passes: weigh a position by how likely drafting gets there, instead of by --step-decay."
    )
    log_every: int = _option(50_000, "Supervised tokens between log lines.", _ABOVE)
    evaluate_every: int = _option(500_000, "Supervised tokens between evaluations.", _ABOVE)
    checkpoint_every: int = _option(250_000, "Supervised tokens between checkpoints.", _ABOVE)
    patience: int = _option(0, "Stop after this number of evaluations without a better tau; 0 is never.", _NOT_NEGATIVE)
    until_tau: float = _option(0.0, "Stop when an evaluation measures this tau; 0 is never.", _NOT_NEGATIVE)
    seed: int = _option(0, "Seed of weights, data order and noise.", _NOT_NEGATIVE)

    def __post_init__(self) -> None:
        for name, value in self._recipe().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _check(self, "training")
        if self.head != KINDS[0] and not self.ce_weight:
            raise ValueError(f"ce_weight=0 leaves nothing to learn: head={self.head!r} has no feature loss")
        self._check_feat_extrapolator()
        if self.shard and (self.optimizer == "muon" or self.ema):
            raise ValueError(
                "shard=True splits parameters, but optimizer='muon' and ema need them whole: use adamw and ema=0"
            )
        eagle_only = {name: getattr(self, name) for name in ("alignment_steps", "markov_rank", "teacher_top")}
        if self.head == "medusa" and tuple(eagle_only.values()) != (1, 0, 0):
            raise ValueError(f"head='medusa' has no EAGLE options, so leave out {', '.join(eagle_only)}: {eagle_only}")
        if self.head == "block":
            self._check_block()
        if self.head != "eagle3" and self.fc_norm:
            raise ValueError("fc_norm=True needs head='eagle3': the features of other heads are already normed")
        if self.head == "mtp" and (self.layers != 1 or self.markov_rank):
            raise ValueError(
                "head='mtp' keeps the sizes of the head that it starts from: leave out layers, markov_rank"
            )
        if not self.ce_weight + self.feature_weight > 0:
            raise ValueError("ce_weight=0 and feature_weight=0 leave nothing to learn: set one of them above 0")

    def _check_feat_extrapolator(self) -> None:
        """Raise ValueError for settings that need a FeatExtrapolator of another form, or one at all."""
        plain = self.head == KINDS[0] and self.layers == 1 and not self.markov_rank and self.inputs == INPUTS[0]
        if self.initialisation == "last-layer" and not plain:
            raise ValueError(
                "initialisation='last-layer' needs a FeatExtrapolator with one layer, no Markov bias and EAGLE's own "
                "inputs: use 'auto'"
            )
        if self.head != KINDS[0] and self.inputs != INPUTS[0]:
            raise ValueError(f"inputs={self.inputs!r} is an ablation of head='feat-extrapolator', not of {self.head!r}")
        if self.layers_read and (self.head != KINDS[0] or self.inputs != INPUTS[0]):
            raise ValueError(
                f"context_layers={self.context_layers!r} needs head={KINDS[0]!r} with EAGLE's own inputs: leave it out"
            )

    def _recipe(self) -> dict[str, Any]:
        """The defaults that depend on other settings."""
        optimizer = self.optimizer or ("adamw" if self.shard else "muon")
        rate, decay = _RATES.get(optimizer, _RATES["adamw"])
        return {
            "optimizer": optimizer,
            "learning_rate": rate,
            "weight_decay": decay,
            "mixed_precision": "no" if self.matmul_precision == "highest" else "auto",
            "feature_noise": 0.2 if self.head == KINDS[0] else 0.0,
            "align_after": 0.7 if self.alignment_steps is None and self.head not in _ONE_PASS else 0.0,
            "alignment_steps": 1 if self.head in _ONE_PASS else 2,
        }

    @property
    def layers_read(self) -> tuple[int, ...]:
        """`context_layers` as numbers. Raises ValueError if they are none, or not ascending."""
        try:
            layers = tuple(int(each) for each in (self.context_layers or "").split(",") if each)
        except ValueError:
            layers = (-1,)
        if list(layers) != sorted({*layers}) or min(layers, default=0) < 0:
            raise ValueError(
                f"context_layers={self.context_layers!r} is not allowed: give ascending layers, such as 8,16,23,28"
            )
        return layers

    def for_data(self, hidden_size: int, supervised: int) -> TrainConfig:
        """A copy with the defaults of `batch_tokens` and `views`, for a hidden size and the supervised tokens."""
        views = self.views or min(max(_EPOCHS * supervised, _FEWEST_VIEWS), _MOST_VIEWS)
        return replace(self.with_batch_tokens(hidden_size), views=views)

    def _check_block(self) -> None:
        """Raise ValueError for settings that a block head, which has a loss of its own, does not use."""
        defaults = {each.name: each.default for each in fields(self)} | {"alignment_steps": 1}
        unused = ["layers", "markov_rank", "alignment_steps", "reach_weights", "teacher_top", "rejected_weight"]
        unused += ["lk_after", "ce_weight"]
        changed = {name: getattr(self, name) for name in unused if getattr(self, name) != defaults[name]}
        if changed:
            raise ValueError(
                f"head='block' does not use {changed}: leave them out (it has block_layers, block_markov_rank, and a "
                f"loss of its own)"
            )

    def with_batch_tokens(self, hidden_size: int) -> TrainConfig:
        """A copy with the default `batch_tokens` for this hidden size, if none was given."""
        batch = _BATCH_BY_SIZE * hidden_size if self.optimizer == "muon" else _BATCH
        return self if self.batch_tokens is not None else replace(self, batch_tokens=batch)

    @property
    def positions(self) -> int:
        """`batch_tokens`, after `with_batch_tokens` has set its default."""
        if self.batch_tokens is None:
            raise ValueError("batch_tokens=None has no value yet: call `with_batch_tokens(hidden_size)` first")
        return self.batch_tokens

    def passes_at(self, views: int) -> int:
        """Number of training passes after `views` supervised tokens: 1 until alignment begins."""
        return self.alignment_steps if views >= self.align_after * self.views else 1

    def sharpness_at(self, views: int) -> float | None:
        """Sharpness of the LK mix after `views` supervised tokens; None (cross-entropy alone) until it begins."""
        return self.lk_sharpness if views >= self.lk_after * self.views and self.lk_after < 1 else None

    def learning_rate_at(self, views: int) -> float:
        """Linear warm-up, then a cosine down to final_learning_rate * learning_rate at the end of the run."""
        done = min(views / self.views, 1.0)
        warmup = max(self.warmup, min(_MIN_WARMUP / self.views, 0.25) if self.warmup else 0.0)
        if done < warmup:
            return self.learning_rate * max(done / warmup, 0.02)
        angle = math.pi * (done - warmup) / (1 - warmup)
        floor = self.final_learning_rate
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(angle)))


@dataclass(frozen=True)
class TrainingData:
    """What a head is trained on, at least one of `answers` and `shards`, and what it is judged by."""

    answers: Path | None = _option(None, "Answers, as `haast regenerate` writes them.")  # noqa: RUF009 - a field
    shards: Path | None = _option(  # noqa: RUF009 - a field
        None, "Feature shards; with --answers, only those of these answers. By default in memory, or in OUT/features."
    )
    valid_prompts: Path | None = _option(None, "Prompts for measuring tau; by default 2 % of the answers' prompts.")  # noqa: RUF009
    valid_limit: int = _option(12, "Number of validation prompts.")
    valid_tokens: int = _option(64, "New tokens per validation prompt.")
    valid_nodes: int = _option(24, "Tree nodes per step on validation prompts.")
    topk: int = _option(16, "Number of the teacher's best tokens stored per position.")
    max_tokens: int = _option(2048, "Cut longer sequences.")
    max_gb: float = _option(20.0, "Maximum size of all shards in GB.")
    loops: str = _option("keep", "keep or drop answers in which over 30 % of the 8-grams repeat.")

    def check(self) -> None:
        """Raise ValueError for a value that is not allowed, or if there is no data."""
        for name in ("valid_limit", "valid_tokens", "topk"):
            check_at_least(name, getattr(self, name))
        check_at_least("max_tokens", self.max_tokens, 3)
        check_at_least("valid_nodes", self.valid_nodes, 2)
        if not self.max_gb > 0:
            raise ValueError(f"max_gb={self.max_gb} is not allowed: give a size above 0")
        if self.loops not in ("keep", "drop"):
            raise ValueError(f"loops={self.loops!r} is unknown: choose keep or drop")
        if self.answers is None and self.shards is None:
            raise ValueError("train needs data: give --answers FILE or --shards DIR (`haast regenerate` makes both)")
