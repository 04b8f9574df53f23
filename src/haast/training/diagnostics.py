"""Checks of a training run's data and of its first results: is all in order, and if tau is about 1, why?

Owns the checks and their thresholds. `check_features` and `overfit_self_test` come before hours are spent; `diagnose`
looks for the usual causes of a tau of about 1. Everything comes as an argument, so it can be asked of any run at any
time. A check of `diagnose` whose evidence is not there (no records, no prompts, nothing held out) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from haast.errors import HeadMismatchError
from haast.heads.config import HeadSizes
from haast.heads.eagle3 import Eagle3Config
from haast.heads.medusa import MedusaConfig
from haast.prompts import evenly
from haast.target.target import Target
from haast.training.batches import Example, pack, usable
from haast.training.config import TrainConfig
from haast.training.data import TokenSequence
from haast.training.features import stream_examples
from haast.training.report import Finding
from haast.training.target_weights import Frozen
from haast.training.trainer import Trainer

_COMPARED, _TOKENS = 8, 32  # sequences, and tokens of each, whose features are computed anew
_LEAST_COSINE = 0.95  # another precision or a quantised copy of the same weights stays above
_OVERFITTED, _LEARNED = 4, 0.9  # sequences, and the top-1 agreement to reach on them
_TEACHER_AGREES = 0.9  # less than 1: stored features are rounded to fp16
_SAMPLE = 64  # sequences looked at, evenly from all: enough for shares, a second at most
_TINY_SHARE = 0.02  # of supervised tokens; even short answers about long texts are more
_ALIEN_SHARE = 0.1  # of answers
_COVERED = 0.8  # of the teacher's mass; 8192 cover 0.99 of the tokens in SmolLM2's answers
_OF_CHANCE = 0.6  # of a uniform head's cross-entropy; to know each token's frequency alone gives 0.73 (SmolLM2, 8192)
_AGREES_OFTEN = 0.2  # held-out top-1 from which tau should be well above 1: it is the chance that a first draft holds
_TEMPLATE = 8  # tokens; more would reach into the first words of a prompt


@torch.inference_mode()
def check_features(target: Target, examples: Sequence[Example], where: str) -> None:
    """Compare stored features with fresh ones: sizes and vocabulary can't tell a model from its fine-tuned sibling.

    Args:
        target: whose features they should be.
        examples: stored ones, at least three tokens each; the beginnings of a few are computed anew.
        where: names them in the message.

    Raises:
        HeadMismatchError: they are another model's, or of another layer.
    """
    some = evenly(examples, _COMPARED)
    tokens = [example.tokens[:_TOKENS].tolist() for example in some]
    for index, fresh in stream_examples(target, [TokenSequence(t, [False] * len(t)) for t in tokens], topk=1):
        rows = len(fresh.tokens) - 1  # the last stored row may be unknown
        stored = some[index].features[:rows].float()
        alike = functional.cosine_similarity(stored, fresh.features[:rows].float(), dim=-1).median().item()
        if alike < _LEAST_COSINE:
            raise HeadMismatchError(
                f"{where}: the stored features are not this target's (median cosine {alike:.2f} with its own): extract "
                f"them again with this target, into another folder"
            )


def overfit_self_test(
    head_config: HeadSizes,
    frozen: Frozen,
    examples: Sequence[Example],
    out_dir: Path,
    *,
    draft_vocab: int = 8192,
    steps: int = 250,
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

    Returns:
        Top-1 agreement reached on that batch.

    Raises:
        ValueError: one of the two agreements is too low: features, tokens and teacher do not belong together.
    """
    some = usable(examples)[:_OVERFITTED]
    if not some:
        raise ValueError("there is nothing to overfit: no sequence has two assistant tokens in a row")
    agreement = _teacher_agreement(frozen, some)
    if agreement < _TEACHER_AGREES:
        raise ValueError(
            f"self-test: the LM head agrees with the teacher at {agreement:.0%} of positions only: the features, "
            f"tokens and teacher of the shards do not belong together; extract them again with this target"
        )
    views = steps * sum(len(example.queries()) for example in some)
    config = TrainConfig(
        views=views,
        draft_vocab=draft_vocab,
        batch_tokens=sum(example.pairs for example in some),
        learning_rate=5e-3,
        head={Eagle3Config: "eagle3", MedusaConfig: "medusa"}.get(type(head_config), "feat-extrapolator"),
        log_every=views,
        evaluate_every=views,
        checkpoint_every=views,
    )
    with TemporaryDirectory(dir=out_dir) as folder:
        run = Trainer(config, head_config, frozen, some, some, Path(folder), quiet=True)
        reached = float(run.run()["valid_top1"])
    if reached < _LEARNED:
        raise ValueError(
            f"self-test: top-1 {reached:.2f} on one batch after {steps} steps, {_LEARNED} wanted. The teacher agrees "
            f"with the features, so the data is sound: a few short answers may not do, so give longer ones"
        )
    return reached


def _teacher_agreement(frozen: Frozen, examples: Sequence[Example]) -> float:
    """Share of supervised positions where the LM head on the aimed-at feature names the teacher's first choice."""
    hits = total = 0
    for example in usable(examples):
        batch = pack([example])
        logits = functional.linear(batch.wanted.to(frozen.head.dtype), frozen.head, frozen.bias)  # (views, vocab)
        hits += int((logits.argmax(-1) == batch.teacher_ids[:, 0]).sum())
        total += batch.views
    return hits / max(total, 1)


def diagnose(
    examples: Sequence[Example],
    frozen: Frozen,
    draft_vocab: Tensor,
    values: Mapping[str, float],
    records: Sequence[Mapping[str, Any]] = (),
    prompts: Sequence[Sequence[int]] = (),
    model: str = "",
) -> list[Finding]:
    """Look for the usual causes of a tau of about 1.

    Args:
        examples: the training sequences.
        frozen: the target's ends.
        draft_vocab: (size,) int64 ids.
        values: the evaluation: `tau`, and where something is held out `valid_ce` and `valid_top1`.
        records: the answer records behind the examples.
        prompts: the validation prompts as tokens, as the engine gets them.
        model: the target's name, as records have it in `model`.

    Returns:
        A finding for each check that could be run.
    """
    some = evenly(examples, _SAMPLE)
    found = [_supervision(some), _inference(values), _origin(records, model), _template(some, prompts)]
    if usable(some):
        found = [_teacher(some, frozen), *found, *_mass(some, draft_vocab, len(frozen.head), values.get("valid_ce"))]
    return [finding for finding in found if finding is not None]


def _finding(check: str, suspect: bool, text: str, remedy: str) -> Finding:
    return Finding(check, text, "suspect" if suspect else "ok", remedy)


def _teacher(examples: Sequence[Example], frozen: Frozen) -> Finding:
    agreement = _teacher_agreement(frozen, examples)
    return _finding(
        "features",
        agreement < _TEACHER_AGREES,
        f"the LM head on the stored features names the teacher's first choice at {agreement:.0%} of positions",
        "features of another layer or target, or shifted: extract them again with this target",
    )


def _supervision(examples: Sequence[Example]) -> Finding:
    total = sum(len(example.tokens) for example in examples)
    share = sum(int(example.supervised.sum()) for example in examples) / max(total, 1)
    # Every sequence begins with a prompt, so a supervised first token is one of the user's.
    whole = sum(bool(example.supervised[:1].any()) for example in examples)
    return _finding(
        "mask",
        share < _TINY_SHARE or 2 * whole > len(examples),
        f"{share:.1%} of tokens are supervised; {whole} of {len(examples)} sequences are from their first token on",
        "only the assistant's tokens should be, and all of them: look at them with --show-data 2",
    )


def _origin(records: Sequence[Mapping[str, Any]], model: str) -> Finding | None:
    if not any("model" in record or "retokenised" in record for record in records):
        return None
    others = [str(record["model"]) for record in records if record.get("model", model) != model]
    again = sum(bool(record.get("retokenised")) for record in records)
    named = f" ({', '.join(sorted(set(others))[:3])})" if others else ""
    return _finding(
        "answers",
        max(len(others), again) > _ALIEN_SHARE * len(records),
        f"{len(others)} of {len(records)} were made by another model{named}, {again} were tokenised from text",
        "let this target answer the prompts itself (haast regenerate)",
    )


def _mass(examples: Sequence[Example], draft_vocab: Tensor, vocab: int, ce: float | None) -> list[Finding]:
    """The teacher's probability at the positions learned from: how much is drafted, and what was learned of it."""
    known = torch.zeros(vocab, dtype=torch.float64).index_fill(0, draft_vocab, 1)
    positions, stored, covered = 0, 0.0, 0.0
    for example in examples:
        after = example.queries() + 1
        probs = example.topk_probs[after].double()  # (m, k): the best tokens only, so they sum to less than 1
        positions += len(after)
        stored += float(probs.sum())
        covered += float((probs * known[example.topk_ids[after].long()]).sum())
    size = len(draft_vocab)
    coverage = _finding(
        "draft vocabulary",
        covered < _COVERED * stored,
        f"its {size} tokens cover {covered / max(stored, 1e-9):.1%} of the teacher's mass",
        "what the target says is not among the tokens drafted: raise draft_vocab",
    )
    if ce is None:
        return [coverage]
    # The cross-entropy is a sum over the mass that is stored and drafted, so a uniform head's is a share of ln(size).
    chance = math.log(size) * covered / positions
    learning = _finding(
        "learning",
        not ce < _OF_CHANCE * chance,  # so that NaN is suspect
        f"the held-out cross-entropy is {ce:.2f}, chance is {chance:.2f}",
        "little or nothing was learned: train for more views, or change learning_rate (half or double it)",
    )
    return [coverage, learning]


def _inference(values: Mapping[str, float]) -> Finding | None:
    if "valid_top1" not in values:
        return None
    top1 = values["valid_top1"]
    return _finding(
        "engine",
        top1 >= _AGREES_OFTEN,
        f"held-out top-1 agreement is {top1:.0%}, tau {values['tau']:.2f}",
        f"tau should be about {1 + top1:.1f} or more: the head is right but its drafts are not used, so validation "
        "prompts differ from the training text (chat template, language), or the engine reads the head otherwise",
    )


def _template(examples: Sequence[Example], prompts: Sequence[Sequence[int]]) -> Finding | None:
    begins = [tuple(example.tokens[:_TEMPLATE].tolist()) for example in examples]
    shared = next((n for n in range(_TEMPLATE, 0, -1) if len({begin[:n] for begin in begins}) == 1), 0)
    if len(begins) < 2 or not shared or not prompts:  # training text that begins anyhow tells nothing
        return None
    same = sum(tuple(prompt[:shared]) == begins[0][:shared] for prompt in prompts)
    return _finding(
        "template",
        2 * same < len(prompts),
        f"{same} of {len(prompts)} validation prompts begin with the {shared} tokens that all training "
        "sequences begin with",
        "the two were put through different chat templates: make both with this target's",
    )
