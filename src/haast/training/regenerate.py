"""The target answers prompts itself: the text that a head is trained on (EAGLE, arXiv 2401.15077, section 3.2).

Owns which questions are asked when, and what becomes of their answers; each is a request to the engine. Knows no files'
forms. An answer is a function of (seed, place of its prompt in the list, turn, target) alone: its draws are keyed so,
and neither the requests beside it, nor a drafter, nor an interruption changes it (where the target's rows are
independent; otherwise up to floating-point ties).

    answers file   see `answers`
    features       optional shards, 256 answers each; what a kill cut off, `features.extract` computes later
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from haast.core import Request, SamplingParams, StopParams
from haast.drafters.base import Drafter
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, raise_error
from haast.engine.step import Computed
from haast.prompts import Prompt
from haast.sampling import Sampler
from haast.target.target import Target
from haast.training.answers import AnswersFile
from haast.training.batches import Example
from haast.training.chat import check_template, encode_prompt, tokenizer_hash
from haast.training.checkpoints import write_probe
from haast.training.features import ShardIdentity, ShardWriter, teacher_topk
from haast.training.generation_queue import TURN_DRAWS, Outcome, Question, Questions, RegenerateConfig, answer_progress
from haast.training.target_weights import end_tokens


class TurnSampler(Sampler):
    """Draws as `Question.draw` does: each turn of a conversation has positions of its own."""

    def __init__(self, params: SamplingParams, question: Question) -> None:
        super().__init__(params, question.index)
        self._before = question.turn * TURN_DRAWS

    def draw(self, position: int) -> float:
        return super().draw(self._before + position)


@dataclass(frozen=True)
class _Asked:
    """A question whose answer is wanted."""

    question: Question
    tokens: list[int]  # as the model reads it
    limit: int  # new tokens at most


@dataclass(frozen=True)
class _Answer:
    """What the target said."""

    question: Question
    request: Request


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


def regenerate(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    out_path: Path,
    config: RegenerateConfig,
    *,
    name: str = "",
    quiet: bool = False,
    drafter: Drafter | None = None,
) -> Outcome:
    """Let the target answer every prompt's turns, appending to `out_path`; done ones are skipped.

    Args:
        target: the model.
        tokenizer: its tokenizer.
        prompts: in the same order on every run: a prompt's draws are keyed by its place.
        out_path: JSON lines, see `answers`.
        config: settings.
        name: the target's name, stored with answers and in feature shards.
        quiet: no progress bar or lines.
        drafter: drafts for it; the answers are the same. None drafts nothing, which is fastest for large batches.

    Returns:
        The counts. Prompts longer than `max_prompt_tokens`, or than the context, are left out.

    Raises:
        ValueError: a folder that cannot be written or a chat template without a place for answers (before the model
            runs), two prompts of one id, a full disk, or another run is writing to `out_path`.
        KVPoolError: the longest prompt and answer could never fit the target's KV pool.
    """
    for folder in (out_path.parent, *([config.features_dir] if config.features_dir else [])):
        write_probe(folder)
    check_template(tokenizer)
    ends, digest, added = end_tokens(target), tokenizer_hash(tokenizer), 0
    engine = Engine(target, drafter or VanillaDrafter())
    with ExitStack() as stack:
        file = stack.enter_context(AnswersFile(out_path, name, digest))
        questions = Questions(prompts, config.turns, file.records)
        progress = stack.enter_context(answer_progress(questions, quiet))
        writer, recording = None, None
        if config.features_dir is not None:
            identity = ShardIdentity.of(target, name, config.topk)
            writer = stack.enter_context(ShardWriter(config.features_dir, identity, config.max_gb))
            recording = _Recording(config.topk)
        take = _waiting(target, tokenizer, questions, config)
        for answer in stack.enter_context(closing(_answers(engine, take, ends, config, recording))):
            tokens = answer.request.new_tokens
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            record = answer.question.record(config, name, digest, text, tokens, tokens[-1] in ends)
            file.add(record)
            questions.answered(answer.question)
            if writer is not None and recording is not None:
                writer.add(recording.example(answer.request), record)
            added += 1
            progress.step(counted=len(tokens))
    return Outcome(questions.total, questions.before, added, tokens=progress.counted)


def _answers(
    engine: Engine,
    take: Callable[[], _Asked | None],
    ends: tuple[int, ...],
    config: RegenerateConfig,
    recording: _Recording | None,
) -> Generator[_Answer, None, None]:
    """Yields each answer as it ends, and asks for more (later turns too) when it goes on; leaving it ends the rest."""
    flying: list[_Answer] = []
    try:
        while True:
            while len(flying) < config.batch and (asked := take()) is not None:
                flying.append(_ask(engine, asked, ends, config, recording))
            if not flying:
                return
            engine.scheduler.advance()
            ended = [answer for answer in flying if answer.request.finished]
            flying = [answer for answer in flying if not answer.request.finished]
            for answer in ended:
                raise_error(answer.request)
                yield answer
    finally:
        for answer in flying:
            engine.cancel(answer.request)


def _ask(
    engine: Engine, asked: _Asked, ends: tuple[int, ...], config: RegenerateConfig, recording: _Recording | None
) -> _Answer:
    question = asked.question
    sampling = SamplingParams(temperature=config.temperature(question.index), seed=config.seed)
    stop, chooser = StopParams(asked.limit, ends), TurnSampler(sampling, question)
    return _Answer(question, engine.submit(asked.tokens, sampling, stop, chooser=chooser, recorder=recording))


def _waiting(
    target: Target, tokenizer: PreTrainedTokenizerBase, questions: Questions, config: RegenerateConfig
) -> Callable[[], _Asked | None]:
    """Takes the next question that has room for an answer."""
    context = target.context_length

    def take() -> _Asked | None:
        while (question := questions.take()) is not None:
            tokens = encode_prompt(tokenizer, question.turns, config.thinking)
            room = config.max_new_tokens if context is None else min(config.max_new_tokens, context - len(tokens))
            if len(tokens) <= config.max_prompt_tokens and room > 0:
                return _Asked(question, tokens, room)
        return None

    return take
