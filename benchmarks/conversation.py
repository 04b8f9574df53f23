"""What a turn of a conversation costs: ten turns with a `Session`, and each of them again from scratch.

    python benchmarks/conversation.py --json results/conversation.json

Both arms answer the same dialogue with the same kind of drafter, one turn each in changing order, and say the same
text, which is checked. The second has a model of its own, whose prefixes are forgotten before each turn. Positions that
a turn computes before its first token are counted by the engine; the time to the first text is wall clock, from the
call to the first piece. Run nothing beside it; three rounds take about two minutes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from haast.api import Haast, Piece
from haast.bench.report import environment
from haast.engine.engine import Stats
from haast.files import write_json
from haast.generation import Message
from haast.progress import Progress
from haast.session import Session
from haast.target.load import DEFAULT_MODEL

_SYSTEM = "You are a patient gardener who answers in two or three sentences."
_TURNS = (
    "I have a balcony that gets sun only in the morning. What could I grow there?",
    "Which of these is the easiest for somebody who has never grown anything?",
    "How large should its pot be, and what should I put at the bottom?",
    "I forgot to ask about the soil. Which one should I buy?",
    "How often do I water it in the first weeks?",
    "Yesterday some of the lower leaves turned yellow. What does that mean?",
    "Should I cut them off, or leave them?",
    "When can I harvest for the first time, and how much at once?",
    "We will be away for nine days in July. How do I keep it alive?",
    "Please sum up your advice as a short list that I can hang on the wall.",
)


@dataclass
class Answer:
    """One turn as one arm gave it."""

    text: str
    stats: Stats
    ms_first: float

    @property
    def prefilled(self) -> int:
        """Prompt positions that were computed."""
        return self.stats.prompt_tokens - self.stats.recalled_tokens


def listen(pieces: Any, stats: Stats, begin: float) -> Answer:
    """Take in a stream of pieces; `begin` is when it was asked for."""
    text, first = "", 0.0
    for piece in pieces:
        assert isinstance(piece, Piece), "streams give pieces"
        first = first or 1e3 * (perf_counter() - begin)
        text += piece.text
    return Answer(text, stats, first)


def kept(session: Session, asked: str, tokens: int) -> Answer:
    """The turn with what the session holds."""
    stats, begin = Stats(), perf_counter()
    return listen(session.stream(asked, max_new_tokens=tokens, stats=stats), stats, begin)


def anew(haast: Haast, dialogue: list[Message], tokens: int) -> Answer:
    """The turn from its dialogue alone."""
    haast.target.pool.clear()
    stats, begin = Stats(), perf_counter()
    return listen(haast.stream(dialogue, max_new_tokens=tokens, stats=stats), stats, begin)


def converse(haast: Haast, forgetful: Haast, tokens: int, turns: int, first: int) -> list[tuple[Answer, Answer]]:
    """(with the session, from scratch) for each turn; the two take turns at beginning.

    Raises:
        RuntimeError: the two said different texts.
    """
    haast.target.pool.clear()  # an earlier round began the same
    session, answers = Session(haast, [{"role": "system", "content": _SYSTEM}]), []
    for number, asked in enumerate(_TURNS[:turns]):
        dialogue = [*session.messages, {"role": "user", "content": asked}]
        if (number + first) % 2:
            scratch = anew(forgetful, dialogue, tokens)
            held = kept(session, asked, tokens)
        else:
            held = kept(session, asked, tokens)
            scratch = anew(forgetful, dialogue, tokens)
        if held.text != scratch.text:
            raise RuntimeError(f"turn {number + 1} differs: {held.text!r} in the session, else {scratch.text!r}")
        answers.append((held, scratch))
    return answers


def turn(number: int, rounds: list[list[tuple[Answer, Answer]]]) -> dict[str, Any]:
    """Counts of one turn, which are the same in every round, and medians of its times."""
    held, scratch = rounds[0][number]
    return {
        "turn": number + 1,
        "prompt_tokens": held.stats.prompt_tokens,
        "prefilled": {"session": held.prefilled, "scratch": scratch.prefilled},
        "ms_first": {
            "session": median(answers[number][0].ms_first for answers in rounds),
            "scratch": median(answers[number][1].ms_first for answers in rounds),
        },
        "answer_tokens": held.stats.tokens,
        "text": held.text,
    }


def main() -> None:
    """Measure and write."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--model", default=DEFAULT_MODEL)
    words.add_argument("--max-new-tokens", type=int, default=64)
    words.add_argument("--turns", type=int, default=len(_TURNS))
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--json", required=True)
    given = words.parse_args()
    head = "default" if given.model == DEFAULT_MODEL else None
    haast, forgetful = (Haast.from_pretrained(given.model, head=head) for _ in range(2))
    for model in (haast, forgetful):
        anew(model, [{"role": "user", "content": "Hello"}], 8)  # warm-up
    rounds = []
    with Progress("conversations", "rounds", given.rounds) as progress:
        for each in range(given.rounds):
            rounds.append(converse(haast, forgetful, given.max_new_tokens, given.turns, each))
            progress.step()
    settings = {"rounds": given.rounds, "max_new_tokens": given.max_new_tokens, "drafter": haast.drafter.name}
    result: dict[str, Any] = {
        "kind": "conversation",
        "conversation": [turn(number, rounds) for number in range(given.turns)],
        "environment": environment(haast.target, given.model, None, given.turns, settings),
    }
    write_json(result, given.json)


if __name__ == "__main__":
    main()
