"""Checks that features, tokens and teacher belong together, before hours are spent. Owns no training of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from haast.heads.config import HeadSizes
from haast.heads.eagle3 import Eagle3Config
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig
from haast.heads.medusa import MedusaConfig
from haast.training.batches import Example, pack, usable
from haast.training.config import TrainConfig
from haast.training.target_weights import Frozen
from haast.training.trainer import Trainer

_SEQUENCES = 4
_KINDS = {"feat-extrapolator": FeatExtrapolatorConfig, "eagle3": Eagle3Config, "medusa": MedusaConfig}
TEACHER_AGREES = 0.9  # less than 1: stored features are rounded to fp16


def overfit_self_test(
    head_config: HeadSizes,
    frozen: Frozen,
    examples: Sequence[Example],
    out_dir: Path,
    *,
    draft_vocab: int = 8192,
    steps: int = 250,
    wanted: float = 0.9,
) -> float:
    """Check the teacher against the features, then overfit one small batch: a sound pipeline learns it nearly by heart.

    Overfitting alone would not do: a network also learns shuffled labels by heart. So first the LM head on the very
    features that are aimed at must name the teacher's first choices.

    Args:
        head_config: sizes of the head.
        frozen: the target's ends.
        examples: the first few are used.
        out_dir: an existing folder for the run's temporary files.
        draft_vocab: size of the draft vocabulary.
        steps: optimiser steps.
        wanted: top-1 agreement to reach.

    Returns:
        Top-1 agreement reached on that batch.

    Raises:
        ValueError: one of the two agreements is too low: features, tokens and teacher do not belong together.
    """
    some = usable(examples)[:_SEQUENCES]
    if not some:
        raise ValueError("there is nothing to overfit: no sequence has two assistant tokens in a row")
    agreement = teacher_agreement(frozen, some)
    remedy = (
        "the features, tokens and teacher of the shards do not belong together; extract them again with this target"
    )
    if agreement < TEACHER_AGREES:
        raise ValueError(
            f"self-test: the LM head agrees with the teacher at {agreement:.0%} of positions only: {remedy}"
        )
    views = steps * sum(len(example.queries()) for example in some)
    config = TrainConfig(
        views=views,
        draft_vocab=draft_vocab,
        batch_tokens=sum(example.pairs for example in some),
        learning_rate=5e-3,
        head=next(name for name, kind in _KINDS.items() if isinstance(head_config, kind)),
        log_every=views,
        evaluate_every=views,
        checkpoint_every=views,
    )
    with TemporaryDirectory(dir=out_dir) as folder:
        run = Trainer(config, head_config, frozen, some, some, Path(folder), quiet=True)
        reached = float(run.run()["valid_top1"])
    if reached < wanted:
        raise ValueError(
            f"self-test: top-1 {reached:.2f} on one batch after {steps} steps, {wanted} wanted. The teacher agrees "
            f"with the features, so the data is sound: a few short answers may not do, so give longer ones"
        )
    return reached


def teacher_agreement(frozen: Frozen, examples: Sequence[Example]) -> float:
    """Share of supervised positions where the LM head on the aimed-at feature names the teacher's first choice."""
    hits = total = 0
    for example in usable(examples):
        batch = pack([example])
        logits = batch.wanted.to(frozen.head.dtype) @ frozen.head.T  # (views, vocab)
        if frozen.bias is not None:
            logits += frozen.bias
        hits += int((logits.argmax(-1) == batch.teacher_ids[:, 0]).sum())
        total += batch.views
    return hits / max(total, 1)
