"""Conversations: `Session`, and `Sessions`, which bounds the memory of many.

What is kept between turns is kept by the target's KV pool: a turn computes only what no text before had in common.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Generator, Sequence
from copy import deepcopy
from typing import Unpack

from haast.api import Haast
from haast.errors import PromptError, QueueFullError, check_at_least
from haast.generation import Generation, Message, Piece, Settings, collected
from haast.stats import Stats
from haast.target.kv_pool import BLOCK


class Session:
    """A dialogue with one `Haast`, one turn at a time.

    Attributes:
        messages: the dialogue so far, as chat messages. Change it as you like: what follows the first change is
            computed anew at the next turn.
    """

    def __init__(self, haast: Haast, messages: Sequence[Message] = ()) -> None:
        """`messages` begin the dialogue (a system message, say). Raises PromptError where there is no chat template."""
        if not haast.tokenizer.chat_template:
            raise PromptError("the tokenizer has no chat template, so this model holds no dialogue: use Haast.generate")
        self.haast = haast
        self.messages: list[Message] = [dict(message) for message in messages]
        self._texts: list[list[int]] = []  # token ids of the turns so far, but for those that a later one begins with

    @property
    def blocks(self) -> list[int]:
        """Blocks of the KV pool that hold the dialogue; other texts that begin the same share them."""
        with self.haast.target.lock:
            return self.haast.target.pool.blocks_of(self._texts[-1], self._key) if self._texts else []

    @property
    def nbytes(self) -> int:
        """Memory of these blocks."""
        return _bytes(self.haast, self.blocks)

    @property
    def _key(self) -> object:
        return self.haast.drafter.prefix_key

    def say(self, text: str, **settings: Unpack[Settings]) -> Generation:
        """One turn: the user's text in, the model's answer out; both join the dialogue.

        Args:
            text: the user's message.
            **settings: see `haast.generation.Settings`.

        Raises:
            PromptError, KVPoolError, QueueFullError: see `Haast.generate`; the dialogue stays as it was.
        """
        stats = Stats()
        return collected(self.stream(text, stats=stats, **settings), stats)

    def stream(
        self, text: str, *, stats: Stats | None = None, **settings: Unpack[Settings]
    ) -> Generator[Piece, None, None]:
        """As `say`, piece by piece. An answer that is cut short joins the dialogue as far as it was said."""
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self.haast.encode(asked)
        return self._listen(asked, prompt, self.haast.stream(prompt, stats=stats, **settings))

    def _listen(
        self, asked: list[Message], prompt: list[int], pieces: Generator[Piece, None, None]
    ) -> Generator[Piece, None, None]:
        answer, said, begun = "", list[int](), True
        try:
            for piece in pieces:
                answer += piece.text
                said.extend(piece.tokens)
                yield piece
        except QueueFullError:
            begun = False
            raise
        finally:
            pieces.close()
            if begun:
                self.messages = [*asked, {"role": "assistant", "content": answer}]
                with self.haast.target.lock:  # earlier texts count as long as they have blocks of their own
                    own, texts = self.haast.target.pool.blocks_of, [*prompt, *said]
                    now = set(own(texts, self._key))
                    self._texts = [*(each for each in self._texts if set(own(each, self._key)) - now), texts]

    def edit(self, number: int, text: str, **settings: Unpack[Settings]) -> Generation:
        """Say something else instead of message `number`, the user's: it is answered, what came after it is forgotten.

        Args:
            number: of the message; -2 is the user's last where the model has answered it.
            text: the new message.
            **settings: see `say`.

        Raises:
            ValueError: there is no such message of the user's. PromptError: see `say`. The dialogue stays as it was.
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
        """A second dialogue that begins as this one: both go on from the same blocks, and nothing is copied."""
        made = Session(self.haast, deepcopy(self.messages))
        made._texts = list(self._texts)
        return made

    def release(self) -> None:
        """Free the blocks that no other text goes on from; the dialogue stays, and its next turn computes them anew."""
        with self.haast.target.lock:
            for text in reversed(self._texts):
                self.haast.target.pool.forget(text, self._key)
        self._texts = []


class Sessions:
    """Dialogues by name, whose cached blocks together stay below a bound.

    Args:
        haast: who answers.
        max_bytes: of all their blocks, 1 or more. Those of whole dialogues are freed, the one that was silent longest
            first; no dialogue is lost.
        messages: how every dialogue begins.
    """

    def __init__(self, haast: Haast, max_bytes: int = 1 << 30, messages: Sequence[Message] = ()) -> None:
        check_at_least("max_bytes", max_bytes)
        self._haast, self.max_bytes, self._begin = haast, max_bytes, list(messages)
        self._held: OrderedDict[str, Session] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Memory of all their blocks; shared ones count once."""
        return _bytes(self._haast, {block for session in self._held.values() for block in session.blocks})

    def __len__(self) -> int:
        return len(self._held)

    def say(self, name: str, text: str, **settings: Unpack[Settings]) -> Generation:
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


def _bytes(haast: Haast, blocks: Collection[int]) -> int:
    """Memory of blocks: the target's keys and values, and the drafter's beside them."""
    caches = (haast.target.cache, *haast.drafter.caches)
    return len(blocks) * BLOCK * sum(cache.bytes_per_token for cache in caches)
