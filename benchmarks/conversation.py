"""Cost of the turns of a conversation: ten turns with a `Session`, and each turn again from scratch.

    python benchmarks/conversation.py --json results/conversation.json

Both arms answer the same dialogue with the same kind of drafter, turn by turn in alternating order, and must generate
the same text. The second arm has a separate model, whose prefix cache is cleared before each turn. The engine counts
the prompt positions that a turn computes before its first token; the time to the first text is wall-clock time from the
call to the first piece. Run nothing else on the machine meanwhile; three rounds take about two minutes.
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
    """The answer of one arm to one turn."""

    text: str
    stats: Stats
    ms_first: float

    @property
    def prefilled(self) -> int:
        """Prompt positions that were computed, not found in the prefix cache."""
        return self.stats.prompt_tokens - self.stats.recalled_tokens


def collect(pieces: Any, stats: Stats, begin: float) -> Answer:
    """Read a stream of pieces; `begin` is the time of its call."""
    text, first = "", 0.0
    for piece in pieces:
        assert isinstance(piece, Piece), "streams give pieces"
        first = first or 1e3 * (perf_counter() - begin)
        text += piece.text
    return Answer(text, stats, first)


def with_session(session: Session, question: str, tokens: int) -> Answer:
    """Answer a turn with the session's cached prefix."""
    stats, begin = Stats(), perf_counter()
    return collect(session.stream(question, max_new_tokens=tokens, stats=stats), stats, begin)


def from_scratch(haast: Haast, dialogue: list[Message], tokens: int) -> Answer:
    """Answer a turn from its dialogue, without a cached prefix."""
    haast.target.pool.clear()
    stats, begin = Stats(), perf_counter()
    return collect(haast.stream(dialogue, max_new_tokens=tokens, stats=stats), stats, begin)


def converse(haast: Haast, uncached: Haast, tokens: int, turns: int, first: int) -> list[tuple[Answer, Answer]]:
    """The answers (with the session, from scratch) of each turn; the arms alternate in going first.

    Raises:
        RuntimeError: the two texts of a turn differ.
    """
    haast.target.pool.clear()  # earlier rounds had the same dialogue
    session, answers = Session(haast, [{"role": "system", "content": _SYSTEM}]), []
    for number, question in enumerate(_TURNS[:turns]):
        dialogue = [*session.messages, {"role": "user", "content": question}]
        if (number + first) % 2:
            scratch = from_scratch(uncached, dialogue, tokens)
            cached = with_session(session, question, tokens)
        else:
            cached = with_session(session, question, tokens)
            scratch = from_scratch(uncached, dialogue, tokens)
        if cached.text != scratch.text:
            raise RuntimeError(f"turn {number + 1} differs: {cached.text!r} in the session, {scratch.text!r} without")
        answers.append((cached, scratch))
    return answers


def turn(number: int, rounds: list[list[tuple[Answer, Answer]]]) -> dict[str, Any]:
    """Counts of one turn, which are equal in all rounds, and medians of its times."""
    cached, scratch = rounds[0][number]
    return {
        "turn": number + 1,
        "prompt_tokens": cached.stats.prompt_tokens,
        "prefilled": {"session": cached.prefilled, "scratch": scratch.prefilled},
        "ms_first": {
            "session": median(answers[number][0].ms_first for answers in rounds),
            "scratch": median(answers[number][1].ms_first for answers in rounds),
        },
        "answer_tokens": cached.stats.tokens,
        "text": cached.text,
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=len(_TURNS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    head = "default" if arguments.model == DEFAULT_MODEL else None
    haast, uncached = (Haast.from_pretrained(arguments.model, head=head) for _ in range(2))
    for model in (haast, uncached):
        from_scratch(model, [{"role": "user", "content": "Hello"}], 8)  # warm-up
    rounds = []
    with Progress("conversations", "rounds", arguments.rounds) as progress:
        for each in range(arguments.rounds):
            rounds.append(converse(haast, uncached, arguments.max_new_tokens, arguments.turns, each))
            progress.step()
    settings = {"rounds": arguments.rounds, "max_new_tokens": arguments.max_new_tokens, "drafter": haast.drafter.name}
    result: dict[str, Any] = {
        "kind": "conversation",
        "conversation": [turn(number, rounds) for number in range(arguments.turns)],
        "environment": environment(haast.target, arguments.model, None, arguments.turns, settings),
    }
    write_json(result, arguments.json)


if __name__ == "__main__":
    main()
