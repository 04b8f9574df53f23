"""Conversations that keep their cache between turns: `Session`, and `Sessions`, which bounds their memory.

Owns the dialogue and whose cache may stay. A turn prefills only what is new; the text is what the same dialogue gives
from scratch, since the cache is only ever used as far as the tokens are the same (`haast.past`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

from haast.api import Generation, Haast, Piece
from haast.engine import PREFILL_CHUNK, Stats
from haast.errors import PromptError
from haast.past import Past
from haast.sampling import SamplingConfig

Message = dict[str, str]


class Session:
    """A dialogue with one `Haast`.

    Attributes:
        messages: the dialogue so far, as chat messages. Change it as you like: what follows the first change is
            prefilled anew at the next turn.
    """

    def __init__(self, haast: Haast, messages: Sequence[Message] = ()) -> None:
        """`messages` is how the dialogue begins: a system message, say.

        Raises:
            PromptError: the target has no chat template.
        """
        if not haast.tokenizer.chat_template:
            raise PromptError("the tokenizer has no chat template, so this model holds no dialogue: use Haast.generate")
        self.haast, self._past = haast, Past()
        self.messages: list[Message] = [dict(message) for message in messages]

    @property
    def nbytes(self) -> int:
        """Memory of the cache."""
        return self._past.nbytes

    def say(self, text: str, **settings: Any) -> Generation:
        """One turn: the user's text in, the model's answer out; both join the dialogue.

        Args:
            text: the user's message.
            **settings: those of `Haast.stream`: `sampling`, `max_new_tokens`, `eos`, `stop`, `prefill_chunk`.

        Raises:
            PromptError: the dialogue no longer fits the context; it stays as it was.
        """
        stats, tokens, answer = Stats(), list[int](), ""
        for piece in self.stream(text, stats=stats, **settings):
            tokens.extend(piece.tokens)
            answer += piece.text
        return Generation(answer, tuple(tokens), stats)

    def stream(
        self,
        text: str,
        *,
        max_new_tokens: int = 256,
        sampling: SamplingConfig | None = None,
        eos: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        stats: Stats | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> Iterator[Piece]:
        """As `say`, piece by piece. An answer that is cut short joins the dialogue as far as it was said."""
        asked = [*self.messages, {"role": "user", "content": text}]
        pieces = self.haast.stream(
            asked,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos=eos,
            stop=stop,
            stats=stats,
            past=self._past,
            prefill_chunk=prefill_chunk,
        )
        return self._listen(asked, pieces)

    def _listen(self, asked: list[Message], pieces: Iterator[Piece]) -> Iterator[Piece]:
        answer = ""
        try:
            for piece in pieces:
                answer += piece.text
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": answer}]

    def edit(self, number: int, text: str, **settings: Any) -> Generation:
        """Say something else instead of message `number`, the user's: it is answered, what came after it is forgotten.

        Args:
            number: of the message; -2 is the user's last where the model has answered it.
            text: the new message.
            **settings: see `say`.

        Raises:
            ValueError: there is no such message, or it is not the user's. PromptError: see `say`. The dialogue stays as
                it was.
        """
        if not -len(self.messages) <= number < len(self.messages):
            raise ValueError(f"there is no message {number}: the dialogue has {len(self.messages)}")
        if self.messages[number]["role"] != "user":
            raise ValueError(f"message {number} is the {self.messages[number]['role']}'s: edit one of the user's")
        before = self.messages
        self.messages = cut = before[: number % len(before)]
        try:
            return self.say(text, **settings)
        finally:
            if self.messages is cut:  # refused, whatever for, before the turn began
                self.messages = before

    def branch(self) -> Session:
        """A second dialogue that begins as this one, with a cache of its own."""
        made = Session(self.haast, deepcopy(self.messages))
        made._past = self._past.copy()
        return made

    def release(self) -> None:
        """Free the cache; the dialogue stays, and its next turn prefills all of it."""
        self._past.forget()


class Sessions:
    """Dialogues by name, whose caches together stay below a bound.

    Args:
        haast: who answers.
        max_bytes: of all caches. Whole caches are freed, the one that was silent longest first; no dialogue is lost.
        messages: how every dialogue begins.

    Raises:
        ValueError: a bound that no cache fits.
    """

    def __init__(self, haast: Haast, max_bytes: int = 1 << 30, messages: Sequence[Message] = ()) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} is not allowed: give 1 or more")
        self._haast, self.max_bytes, self._begin = haast, max_bytes, list(messages)
        self._held: OrderedDict[str, Session] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Memory of all caches."""
        return sum(session.nbytes for session in self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def say(self, name: str, text: str, **settings: Any) -> Generation:
        """One turn of the dialogue `name`, which begins with its first turn. See `Session.say`."""
        session = self._held.get(name) or Session(self._haast, self._begin)
        said = session.say(text, **settings)
        self._held[name] = session
        self._held.move_to_end(name)
        self._make_room()
        return said

    def __getitem__(self, name: str) -> Session:
        """The dialogue `name`. Raises KeyError."""
        return self._held[name]

    def close(self, name: str) -> None:
        """Forget a dialogue. Raises KeyError."""
        del self._held[name]

    def _make_room(self) -> None:
        for session in list(self._held.values()):
            if self.nbytes <= self.max_bytes:
                return
            session.release()
