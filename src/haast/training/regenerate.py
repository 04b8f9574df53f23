"""Answer generation by the target: the text that a head is trained on (EAGLE, arXiv 2401.15077, section 3.2).

Owns the scheduling of questions, each a request to the engine, and passes the answers on. Does not know file formats.
An answer is a function of (seed, index of its prompt in the list, turn, target) alone: these key its random draws, so
other requests in the batch, a drafter or an interruption do not change it (if the target computes rows independently;
otherwise up to floating-point ties).

    answers file   see `answers`
    features       optional shards: of new answers as they are generated (`recorder`), then of those in the file that
                   have none yet (`features.extract`)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

from torch.nn.functional import pad

from haast.core import Request, SamplingParams, StopParams
from haast.drafters.base import Drafter
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, raise_error
from haast.sampling import Sampler
from haast.stats import tail_loops
from haast.target.target import Target
from haast.training.batches import Example
from haast.training.checkpoints import write_probe
from haast.training.data import TokenSequence, encode_answers
from haast.training.features import LEAST_TOKENS, extract, make_example
from haast.training.generation_queue import POSITIONS_PER_TURN, AnswerRun, Outcome, Question
from haast.training.recorder import FeatureRecorder
from haast.training.shards import ShardIdentity, write_shards


class TurnSampler(Sampler):
    """Draws random numbers as `Question.draw` does: each turn of a conversation has its own position keys."""

    def __init__(self, params: SamplingParams, question: Question) -> None:
        super().__init__(params, question.index)
        self._offset = question.turn * POSITIONS_PER_TURN

    def draw(self, position: int) -> float:
        return super().draw(self._offset + position)


def regenerate(target: Target, run: AnswerRun, drafter: Drafter | None = None) -> Outcome:
    """Generate the target's answers to the turns of all prompts.

    Args:
        target: the model.
        run: the prompts and the answers file.
        drafter: does not change the answers. None decodes without drafts, which is fastest for large batches.

    Returns:
        The counts. Prompts longer than `max_prompt_tokens`, or than the context, are left out.

    Raises:
        ValueError: before the model runs, a folder that cannot be written or an error of `AnswerRun`; a full disk.
        KVPoolError: the longest prompt and answer do not fit the target's KV pool.
    """
    config, ends = run.config, target.end_ids
    identity, recorder = None, None
    if config.shards is not None:
        write_probe(config.shards)
        identity = ShardIdentity.of(target, run.name, config.topk)
        recorder = FeatureRecorder() if drafter is None else None
    engine = Engine(target, recorder or drafter or VanillaDrafter())
    with run, closing(_generate_answers(engine, run, ends)) as answers:
        kept = _keep(target, run, answers, recorder)
        if config.shards is not None and identity is not None:
            write_shards(config.shards, identity, kept, config.max_gb)
        else:
            deque(kept, maxlen=0)
    if config.shards is not None and identity is not None:
        sequences = encode_answers(run.tokenizer, run.records, vocab_size=target.vocab_size)
        extract(target, sequences, config.shards, identity, max_gb=config.max_gb, quiet=run.quiet)
    return run.outcome()


def _keep(
    target: Target,
    run: AnswerRun,
    answers: Iterable[tuple[Question, Request]],
    recorder: FeatureRecorder | None,
) -> Iterator[tuple[Example, dict[str, Any]]]:
    """Store finished answers; with a recorder yield their examples and records.

    The last token was never run: its features are zeros, which no example needs (see `batches`).
    """
    for question, request in answers:
        tokens = request.new_tokens
        text = str(run.tokenizer.decode(tokens, skip_special_tokens=True))
        record = run.keep(question, text, tokens, tokens[-1] in target.end_ids)
        if recorder is None:
            continue
        run_features = recorder.take(request)
        length = request.prompt_length + len(record["response_ids"])  # without what was cut off as a loop
        if length < LEAST_TOKENS:
            continue
        features = pad(run_features, (0, 0, 0, 1))[:length]
        supervised = [position >= request.prompt_length for position in range(length)]
        sequence = TokenSequence(request.tokens[:length], supervised, record)
        yield make_example(target, sequence, features, run.config.topk), record


def _loops(tokens: Sequence[int]) -> bool:
    """Whether an answer may end, since it only repeats itself."""
    return tail_loops(tokens) > 0


def _generate_answers(
    engine: Engine, run: AnswerRun, ends: tuple[int, ...]
) -> Generator[tuple[Question, Request], None, None]:
    """Yield finished answers; submit more questions (also later turns) in between. Closing cancels running requests."""
    running, config = list[tuple[Question, Request]](), run.config
    looping = _loops if config.loops == "cut" else None
    try:
        while True:
            while len(running) < config.batch and (item := run.take(engine.target.context_length)) is not None:
                question, tokens, limit = item
                sampling = SamplingParams(temperature=config.temperature(question.index), seed=config.seed)
                stop, chooser = StopParams(limit, ends, looping), TurnSampler(sampling, question)
                request = engine.submit(tokens, sampling, stop, chooser=chooser)
                running.append((question, request))
            if not running:
                return
            engine.scheduler.advance()
            finished = [each for each in running if each[1].finished]
            running = [each for each in running if not each[1].finished]
            for question, request in finished:
                raise_error(request)
                yield question, request
    finally:
        for _, request in running:
            engine.cancel(request)
