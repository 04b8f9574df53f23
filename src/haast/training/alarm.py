"""Why tau is about 1: the usual causes, each with a check that is really run. Owns the checks and their thresholds.

Knows no engine and no trainer's state: everything comes as an argument, so it can be asked of any run at any time.
A check whose evidence is not there (no records, no prompts, nothing held out) is left out, not passed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from haast.training.batches import Example
from haast.training.findings import Finding
from haast.training.selftest import TEACHER_AGREES, teacher_agreement
from haast.training.target_weights import Frozen

_SAMPLE = 64  # sequences looked at, evenly from all: enough for shares, a second at most
_TINY_SHARE = 0.02  # of supervised tokens; even short answers about long texts are more
_ALIEN_SHARE = 0.1  # of answers
_COVERED = 0.8  # of the teacher's mass; 8192 cover 0.99 of the tokens in SmolLM2's answers
_OF_CHANCE = (
    0.6  # of a uniform head's cross-entropy; knowing only how frequent each token is comes to 0.73 (SmolLM2, 8192)
)
_AGREES_OFTEN = 0.2  # held-out top-1 from which tau should be well above 1: it is the chance that a first draft holds
_TEMPLATE = 8  # tokens; more would reach into the first words of a prompt


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
    step = max(len(examples) // _SAMPLE, 1)
    some = list(examples)[::step][:_SAMPLE]
    mass = _Mass.of(some, draft_vocab, len(frozen.head))
    found = [
        _teacher(some, frozen),
        _supervision(some),
        _origin(records, model),
        _coverage(mass, len(draft_vocab)),
        _learning(values, mass, len(draft_vocab)),
        _inference(values),
        _template(some, prompts),
    ]
    return [finding for finding in found if finding is not None]


def _finding(check: str, suspect: bool, text: str, remedy: str) -> Finding:
    return Finding(check, text, "suspect" if suspect else "ok", remedy)


def _teacher(examples: Sequence[Example], frozen: Frozen) -> Finding | None:
    if not any(example.queries().numel() for example in examples):
        return None
    agreement = teacher_agreement(frozen, examples)
    return _finding(
        "features",
        agreement < TEACHER_AGREES,
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


@dataclass(frozen=True)
class _Mass:
    """The teacher's probability at the positions that are learned from."""

    positions: int
    stored: float  # sum over positions; its best tokens only, so below their number
    covered: float  # of that, on tokens of the draft vocabulary

    @staticmethod
    def of(examples: Sequence[Example], draft_vocab: Tensor, vocab: int) -> _Mass:
        known = torch.zeros(vocab, dtype=torch.float64)
        known[draft_vocab] = 1
        positions, stored, covered = 0, 0.0, 0.0
        for example in examples:
            after = example.queries() + 1
            probs = example.topk_probs[after].double()  # (m, k)
            positions += len(after)
            stored += float(probs.sum())
            covered += float((probs * known[example.topk_ids[after].long()]).sum())
        return _Mass(positions, stored, covered)


def _coverage(mass: _Mass, size: int) -> Finding | None:
    if not mass.stored:
        return None
    return _finding(
        "draft vocabulary",
        mass.covered < _COVERED * mass.stored,
        f"its {size} tokens cover {mass.covered / mass.stored:.1%} of the teacher's mass",
        "what the target says is not among the tokens drafted: raise draft_vocab",
    )


def _learning(values: Mapping[str, float], mass: _Mass, size: int) -> Finding | None:
    if "valid_ce" not in values or not mass.positions:
        return None
    # The cross-entropy is a sum over the mass that is stored and drafted, so a uniform head's is a share of ln(size).
    ce, chance = values["valid_ce"], math.log(size) * mass.covered / mass.positions
    return _finding(
        "learning",
        not ce < _OF_CHANCE * chance,  # so that NaN is suspect
        f"the held-out cross-entropy is {ce:.2f}, chance is {chance:.2f}",
        "little or nothing was learned: train for more views, or change learning_rate (half or double it)",
    )


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
    sequences = [example.tokens[:_TEMPLATE].tolist() for example in examples]
    shared: list[int] = []
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    if len(sequences) < 2 or not shared or not prompts:  # training text that begins anyhow tells nothing
        return None
    same = sum(list(prompt[: len(shared)]) == shared for prompt in prompts)
    return _finding(
        "template",
        2 * same < len(prompts),
        f"{same} of {len(prompts)} validation prompts begin with the {len(shared)} tokens that all training "
        "sequences begin with",
        "the two were put through different chat templates: make both with this target's",
    )
