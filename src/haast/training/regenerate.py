"""The target answers prompts itself: the text that a head is trained on (EAGLE, arXiv 2401.15077, section 3.2).

Owns which questions are asked when, and what becomes of their answers; each is a request to the engine. Knows no files'
forms. An answer is a function of (seed, place of its prompt in the list, turn, target) alone: its draws are keyed so,
and neither the requests beside it, nor a drafter, nor an interruption changes it (where the target's rows are
independent; otherwise up to floating-point ties).

    answers file   see `answers`
    features       optional shards, of every answer in the file that has none yet; see `features.extract`
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

from haast.core import Request, SamplingParams, StopParams
from haast.drafters.base import Drafter
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, raise_error
from haast.sampling import Sampler
from haast.target.target import Target
from haast.training.checkpoints import write_probe
from haast.training.data import encode_answers
from haast.training.features import extract
from haast.training.generation_queue import TURN_DRAWS, AnswerRun, Outcome, Question
from haast.training.shards import ShardIdentity


class TurnSampler(Sampler):
    """Draws as `Question.draw` does: each turn of a conversation has positions of its own."""

    def __init__(self, params: SamplingParams, question: Question) -> None:
        super().__init__(params, question.index)
        self._before = question.turn * TURN_DRAWS

    def draw(self, position: int) -> float:
        return super().draw(self._before + position)


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
    config, engine, ends = run.config, Engine(target, drafter or VanillaDrafter()), target.end_ids
    identity = None
    if config.shards is not None:
        write_probe(config.shards)
        identity = ShardIdentity.of(target, run.name, config.topk)
    with run, closing(_answers(engine, run, ends)) as answers:
        for question, request in answers:
            tokens = request.new_tokens
            text = str(run.tokenizer.decode(tokens, skip_special_tokens=True))
            run.keep(question, text, tokens, tokens[-1] in ends)
    if config.shards is not None and identity is not None:
        sequences = encode_answers(run.tokenizer, run.records, vocab_size=target.vocab_size)
        extract(target, sequences, config.shards, identity, max_gb=config.max_gb, quiet=run.quiet)
    return run.outcome()


def _answers(engine: Engine, run: AnswerRun, ends: tuple[int, ...]) -> Generator[tuple[Question, Request], None, None]:
    """Yields each answer as it ends, and asks for more (later turns too) when it goes on; leaving it ends the rest."""
    flying, config = list[tuple[Question, Request]](), run.config
    try:
        while True:
            while len(flying) < config.batch and (asked := run.take(engine.target.context_length)) is not None:
                question, tokens, limit = asked
                sampling = SamplingParams(temperature=config.temperature(question.index), seed=config.seed)
                stop, chooser = StopParams(limit, ends), TurnSampler(sampling, question)
                request = engine.submit(tokens, sampling, stop, chooser=chooser)
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
