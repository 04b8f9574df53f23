"""The target answers prompts itself: the text that a head is trained on (EAGLE, arXiv 2401.15077, section 3.2).

Owns which questions are asked when, and what becomes of their answers; each is a request to the engine. Knows no files'
forms. An answer is a function of (seed, place of its prompt in the list, turn, target) alone: its draws are keyed so,
and neither the requests beside it, nor a drafter, nor an interruption changes it (where the target's rows are
independent; otherwise up to floating-point ties).

    answers file   see `answers`
    features       optional shards, 256 answers each; what a kill cut off, `features.extract` computes later
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from haast.core import Request, SamplingParams, StopParams
from haast.drafters.base import Drafter
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, raise_error
from haast.engine.step import Computed
from haast.sampling import Sampler
from haast.target.target import Target
from haast.training.batches import Example
from haast.training.checkpoints import write_probe
from haast.training.features import teacher_topk
from haast.training.generation_queue import TURN_DRAWS, AnswerRun, Outcome, Question
from haast.training.shards import ShardIdentity, ShardWriter


class TurnSampler(Sampler):
    """Draws as `Question.draw` does: each turn of a conversation has positions of its own."""

    def __init__(self, params: SamplingParams, question: Question) -> None:
        super().__init__(params, question.index)
        self._before = question.turn * TURN_DRAWS

    def draw(self, position: int) -> float:
        return super().draw(self._before + position)


@dataclass
class _Found:
    """What the target computed at the positions of one text."""

    known: int = 0  # positions
    features: list[Tensor] = field(default_factory=list)  # (n, hidden) float16 each
    teacher: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # from the prompt's last position on


class _Recording:
    """Features and the teacher's best tokens of the answers in the making."""

    def __init__(self, topk: int) -> None:
        self._topk = topk
        self._found: dict[Request, _Found] = {}

    def __call__(self, computed: Computed) -> None:
        """Copy what is new."""
        stored = torch.split(computed.features.half().cpu(), list(computed.counts))
        ids, probs = teacher_topk(computed.logits, self._topk)
        taught = 0
        for request, begin, features in zip(computed.requests, computed.begins, stored, strict=True):
            found, end = self._found.setdefault(request, _Found()), begin + len(features)
            if end > found.known:  # else it is computed once more, after a preemption
                found.features.append(features[max(found.known - begin, 0) :].clone())
                found.known = end
            chosen = min(len(features), len(ids) - taught)  # of a prompt its last position at most
            if chosen:
                part = slice(taught, taught + chosen)
                found.teacher.append((ids[part], probs[part]))
                taught += chosen

    def example(self, request: Request) -> Example:
        """A finished answer, which is forgotten. Nothing computed its last token's feature."""
        found = self._found.pop(request)
        ids, probs = (torch.cat(parts) for parts in zip(*found.teacher, strict=True))
        before, tokens = request.prompt_length, request.tokens
        end = len(tokens) - 1  # what was computed after it, a stop rule has cut off
        all_ids, all_probs = ids.new_zeros(len(tokens), self._topk), probs.new_zeros(len(tokens), self._topk)
        all_ids[before - 1 : end], all_probs[before - 1 : end] = ids[: end + 1 - before], probs[: end + 1 - before]
        supervised = torch.zeros(len(tokens), dtype=torch.uint8)
        supervised[before:] = 1
        features = torch.cat(found.features)[:end]
        padded = torch.cat([features, features.new_zeros(1, features.shape[1])])
        return Example(torch.tensor(tokens, dtype=torch.int32), padded, supervised, all_ids, all_probs)


def regenerate(target: Target, run: AnswerRun, drafter: Drafter | None = None) -> Outcome:
    """Let the target answer every prompt's turns.

    Args:
        target: the model.
        run: what is asked, and where answers go.
        drafter: drafts for it; the answers are the same. None drafts nothing, which is fastest for large batches.

    Returns:
        The counts. Prompts longer than `max_prompt_tokens`, or than the context, are left out.

    Raises:
        ValueError: before the model runs, a folder that cannot be written or what `AnswerRun` refuses; a full disk.
        KVPoolError: the longest prompt and answer could never fit the target's KV pool.
    """
    config, engine = run.config, Engine(target, drafter or VanillaDrafter())
    ends = target.end_ids
    if config.shards is not None:
        write_probe(config.shards)
    with ExitStack() as stack:
        stack.enter_context(run)
        writer, recording = None, None
        if config.shards is not None:
            identity = ShardIdentity.of(target, run.name, config.topk)
            writer = stack.enter_context(ShardWriter(config.shards, identity, config.max_gb))
            recording = _Recording(config.topk)
        for question, request in stack.enter_context(closing(_answers(engine, run, ends, recording))):
            tokens = request.new_tokens
            text = str(run.tokenizer.decode(tokens, skip_special_tokens=True))
            record = run.keep(question, text, tokens, tokens[-1] in ends)
            if writer is not None and recording is not None:
                writer.add(recording.example(request), record)
    return run.outcome()


def _answers(
    engine: Engine, run: AnswerRun, ends: tuple[int, ...], recording: _Recording | None
) -> Generator[tuple[Question, Request], None, None]:
    """Yields each answer as it ends, and asks for more (later turns too) when it goes on; leaving it ends the rest."""
    flying, config = list[tuple[Question, Request]](), run.config
    try:
        while True:
            while len(flying) < config.batch and (asked := run.take(engine.target.context_length)) is not None:
                question, tokens, limit = asked
                sampling = SamplingParams(temperature=config.temperature(question.index), seed=config.seed)
                stop, chooser = StopParams(limit, ends), TurnSampler(sampling, question)
                request = engine.submit(tokens, sampling, stop, chooser=chooser, recorder=recording)
                flying.append((question, request))
            if not flying:
                return
            engine.scheduler.advance()
            ended = [each for each in flying if each[1].finished]
            flying = [each for each in flying if not each[1].finished]
            for question, request in ended:
                raise_error(request)
                yield question, request
    finally:
        for _, request in flying:
            engine.cancel(request)
