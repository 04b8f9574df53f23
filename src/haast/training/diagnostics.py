"""Checks of training data, and a diagnosis of runs whose tau stays at about 1.

Owns the checks and their thresholds. `check_features` and `overfit_self_test` run before training; `diagnose` looks
for the usual causes of a tau of about 1. All inputs are arguments, so the checks work on any run at any time.
`diagnose` leaves out a check whose inputs are missing (no records, no prompts, no held-out sequences).
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
from haast.heads.block import BlockConfig
from haast.heads.config import HeadSizes
from haast.heads.eagle3 import Eagle3Config
from haast.heads.medusa import MedusaConfig
from haast.heads.mtp import MtpConfig
from haast.prompts import evenly
from haast.target.target import Target
from haast.training.batches import Example, pack, usable
from haast.training.config import TrainConfig
from haast.training.data import TokenSequence
from haast.training.features import stream_examples
from haast.training.report import Finding
from haast.training.target_weights import TargetWeights
from haast.training.trainer import Trainer

_COMPARED_SEQUENCES, _COMPARED_TOKENS = 8, 32  # number of sequences, and of their first tokens, to recompute
_MIN_COSINE = 0.95  # another precision or a quantised copy of the same weights stays above this
_NAMES: dict[type, str] = {Eagle3Config: "eagle3", MedusaConfig: "medusa", MtpConfig: "mtp", BlockConfig: "block"}
_OVERFIT_SEQUENCES, _MIN_OVERFIT_TOP1 = 4, 0.9  # number of sequences, and the top-1 agreement to reach on them
_MIN_TEACHER_AGREEMENT = 0.9  # less than 1: stored features are rounded to fp16
_SAMPLE_SEQUENCES = 64  # sequences checked, spread evenly over all: enough to estimate shares, takes a second at most
_MIN_SUPERVISED_SHARE = 0.02  # of supervised tokens; even short answers about long texts are more
_MAX_FOREIGN_SHARE = 0.1  # of answers
_MIN_COVERAGE = 0.8  # of the teacher's probability; 8192 tokens cover 0.99 of SmolLM2's answers
_MAX_CE_SHARE = 0.6  # of a uniform head's cross-entropy; knowing only token frequencies gives 0.73 (SmolLM2, 8192)
_MIN_TOP1 = 0.2  # from this held-out top-1 on tau should be well above 1: a first draft is accepted this often
_TEMPLATE_TOKENS = 8  # first tokens compared; more would reach into the user's text


@torch.inference_mode()
def check_features(target: Target, examples: Sequence[Example], where: str) -> None:
    """Compare stored features with recomputed ones: a fine-tuned copy has the same sizes and vocabulary.

    Args:
        target: the model that should have made the features.
        examples: with stored features, at least three tokens each; the first tokens of a few are recomputed.
        where: name of the shards in the error message.

    Raises:
        HeadMismatchError: the features are of another model or another layer.
    """
    sample = evenly(examples, _COMPARED_SEQUENCES)
    tokens = [example.tokens[:_COMPARED_TOKENS].tolist() for example in sample]
    for index, fresh in stream_examples(target, [TokenSequence(t, [False] * len(t)) for t in tokens], topk=1):
        rows = len(fresh.tokens) - 1  # the last stored row may be unknown
        stored = sample[index].features[:rows].float()
        cosine = functional.cosine_similarity(stored, fresh.features[:rows].float(), dim=-1).median().item()
        if cosine < _MIN_COSINE:
            raise HeadMismatchError(
                f"{where}: the stored features are not this target's (median cosine similarity {cosine:.2f}): extract "
                f"them again with this target, into another folder"
            )


def overfit_self_test(
    head_config: HeadSizes,
    target_weights: TargetWeights,
    examples: Sequence[Example],
    out_dir: Path,
    *,
    draft_vocab: int = 8192,
    steps: int = 250,
) -> float:
    """Check the teacher against the features, then overfit one small batch: correct data reaches a top-1 near 1.

    Overfitting alone proves little, since a network can also memorise shuffled labels. So the LM head, applied to the
    features that the head learns, must first give the teacher's top tokens.

    Args:
        head_config: sizes of the head.
        target_weights: the target's embedding and LM head.
        examples: the first few are used.
        out_dir: an existing folder for the run's temporary files.
        draft_vocab: size of the draft vocabulary.
        steps: optimiser steps.

    Returns:
        Top-1 agreement top1 on that batch.

    Raises:
        ValueError: one of the two agreements is too low: features, tokens and teacher do not belong together.
    """
    batch = usable(examples)[:_OVERFIT_SEQUENCES]
    if not batch:
        raise ValueError("there is nothing to overfit: no sequence has two assistant tokens in a row")
    agreement = _teacher_agreement(target_weights, batch)
    if agreement < _MIN_TEACHER_AGREEMENT:
        raise ValueError(
            f"self-test: the LM head agrees with the teacher at only {agreement:.0%} of positions: the features, "
            f"tokens and teacher of the shards do not belong together; extract them again with this target"
        )
    views = steps * sum(len(example.queries()) for example in batch)
    config = TrainConfig(
        views=views,
        draft_vocab=draft_vocab,
        batch_tokens=sum(example.pairs for example in batch),
        optimizer="adamw",
        learning_rate=5e-3,
        alignment_steps=1,
        feature_noise=0.0,
        head=_NAMES.get(type(head_config), "feat-extrapolator"),
        log_every=views,
        evaluate_every=views,
        checkpoint_every=views,
    )
    with TemporaryDirectory(dir=out_dir) as folder:
        run = Trainer(config, head_config, target_weights, batch, batch, Path(folder), quiet=True)
        top1 = float(run.run()["valid_top1"])
    if top1 < _MIN_OVERFIT_TOP1:
        raise ValueError(
            f"self-test: top-1 {top1:.2f} on one batch after {steps} steps, expected at least {_MIN_OVERFIT_TOP1}. The "
            f"teacher agrees with the features, so the data is correct but may be too short: give longer answers"
        )
    return top1


def _teacher_agreement(target_weights: TargetWeights, examples: Sequence[Example]) -> float:
    """Share of supervised positions where the LM head on the target's feature gives the teacher's top token."""
    hits = total = 0
    for example in usable(examples):
        batch = pack([example])
        lm_head, bias = target_weights.lm_head, target_weights.lm_head_bias
        logits = functional.linear(batch.target_features.to(lm_head.dtype), lm_head, bias)  # (M, vocab)
        hits += int((logits.argmax(-1) == batch.teacher_ids[:, 0]).sum())
        total += batch.supervised_count
    return hits / max(total, 1)


def diagnose(
    examples: Sequence[Example],
    target_weights: TargetWeights,
    draft_vocab: Tensor,
    values: Mapping[str, float],
    records: Sequence[Mapping[str, Any]] = (),
    prompts: Sequence[Sequence[int]] = (),
    model: str = "",
) -> list[Finding]:
    """Look for the usual causes of a tau of about 1.

    Args:
        examples: the training sequences.
        target_weights: the target's embedding and LM head.
        draft_vocab: (size,) int64 ids.
        values: the evaluation: `tau`, and with held-out sequences `valid_ce` and `valid_top1`.
        records: the answer records that the examples were made from.
        prompts: the validation prompts as token ids.
        model: the target's name, as in the `model` field of records.

    Returns:
        A finding for each check that could be run.
    """
    sample = evenly(examples, _SAMPLE_SEQUENCES)
    findings = [
        _check_mask(sample),
        _check_engine(values),
        _check_origin(records, model),
        _check_template(sample, prompts),
    ]
    if usable(sample):
        vocab, ce = len(target_weights.lm_head), values.get("valid_ce")
        more = _check_coverage_and_learning(sample, draft_vocab, vocab, ce)
        findings = [_check_teacher(sample, target_weights), *findings, *more]
    return [finding for finding in findings if finding is not None]


def _finding(check: str, suspect: bool, text: str, remedy: str) -> Finding:
    return Finding(check, text, "suspect" if suspect else "ok", remedy)


def _check_teacher(examples: Sequence[Example], target_weights: TargetWeights) -> Finding:
    agreement = _teacher_agreement(target_weights, examples)
    return _finding(
        "features",
        agreement < _MIN_TEACHER_AGREEMENT,
        f"the LM head on the stored features gives the teacher's top token at {agreement:.0%} of positions",
        "the features are of another layer or target, or shifted: extract them again with this target",
    )


def _check_mask(examples: Sequence[Example]) -> Finding:
    total = sum(len(example.tokens) for example in examples)
    share = sum(int(example.supervised.sum()) for example in examples) / max(total, 1)
    # Every sequence begins with a prompt, so a supervised first token means that user text is supervised.
    whole = sum(bool(example.supervised[:1].any()) for example in examples)
    return _finding(
        "mask",
        share < _MIN_SUPERVISED_SHARE or 2 * whole > len(examples),
        f"{share:.1%} of tokens are supervised; {whole} of {len(examples)} sequences from their first token on",
        "all assistant tokens should be supervised and no others: inspect them with --show-data 2",
    )


def _check_origin(records: Sequence[Mapping[str, Any]], model: str) -> Finding | None:
    if not any("model" in record or "retokenised" in record for record in records):
        return None
    others = [str(record["model"]) for record in records if record.get("model", model) != model]
    retokenised = sum(bool(record.get("retokenised")) for record in records)
    named = f" ({', '.join(sorted(set(others))[:3])})" if others else ""
    return _finding(
        "answers",
        max(len(others), retokenised) > _MAX_FOREIGN_SHARE * len(records),
        f"{len(others)} of {len(records)} are from another model{named}, {retokenised} were tokenised from text",
        "generate the answers with this target (haast regenerate)",
    )


def _check_coverage_and_learning(
    examples: Sequence[Example], draft_vocab: Tensor, vocab: int, ce: float | None
) -> list[Finding]:
    """Coverage of the teacher's probability by the draft vocabulary, and the held-out loss against a uniform head's."""
    drafted = torch.zeros(vocab, dtype=torch.float64).index_fill(0, draft_vocab, 1)
    positions, stored, covered = 0, 0.0, 0.0
    for example in examples:
        after = example.queries() + 1
        probs = example.topk_probs[after].double()  # (m, k): the best tokens only, so they sum to less than 1
        positions += len(after)
        stored += float(probs.sum())
        covered += float((probs * drafted[example.topk_ids[after].long()]).sum())
    size = len(draft_vocab)
    coverage = _finding(
        "draft vocabulary",
        covered < _MIN_COVERAGE * stored,
        f"its {size} tokens cover {covered / max(stored, 1e-9):.1%} of the teacher's probability",
        "many of the target's tokens cannot be drafted: raise draft_vocab",
    )
    if ce is None:
        return [coverage]
    # The cross-entropy sums only over stored tokens that can be drafted, so a uniform head has a share of ln(size).
    chance = math.log(size) * covered / positions
    learning = _finding(
        "learning",
        not ce < _MAX_CE_SHARE * chance,  # so that NaN is suspect
        f"the held-out cross-entropy is {ce:.2f}, that of a uniform head {chance:.2f}",
        "the head learned little or nothing: train longer (--views), or halve or double learning_rate",
    )
    return [coverage, learning]


def _check_engine(values: Mapping[str, float]) -> Finding | None:
    if "valid_top1" not in values:
        return None
    top1 = values["valid_top1"]
    return _finding(
        "engine",
        top1 >= _MIN_TOP1,
        f"held-out top-1 agreement is {top1:.0%}, tau {values['tau']:.2f}",
        f"tau should be about {1 + top1:.1f} or more: the head predicts well but its drafts are rejected, so the "
        "validation prompts differ from the training text (chat template, language), or the engine feeds the head "
        "other inputs than training did",
    )


def _check_template(examples: Sequence[Example], prompts: Sequence[Sequence[int]]) -> Finding | None:
    begins = [tuple(example.tokens[:_TEMPLATE_TOKENS].tolist()) for example in examples]
    shared = next((n for n in range(_TEMPLATE_TOKENS, 0, -1) if len({begin[:n] for begin in begins}) == 1), 0)
    if len(begins) < 2 or not shared or not prompts:  # without a common beginning there is nothing to compare
        return None
    same = sum(tuple(prompt[:shared]) == begins[0][:shared] for prompt in prompts)
    return _finding(
        "template",
        2 * same < len(prompts),
        f"{same} of {len(prompts)} validation prompts begin with the {shared} tokens that begin all training sequences",
        "the two used different chat templates: render both with this target's",
    )
