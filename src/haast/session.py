"""Multi-turn chats: `Session`, and `Sessions`, which limits the KV memory of many.

The target's KV pool caches the KV blocks between turns, so each turn only prefills tokens that are not cached yet.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Generator, Sequence
from copy import deepcopy
from typing import Unpack

from haast.api import Haast
from haast.errors import PromptError, QueueFullError, check_at_least
from haast.generation import Generation, Message, Piece, Settings, collect
from haast.stats import Stats
from haast.target.kv_pool import BLOCK


class Session:
    """A dialogue with one `Haast`, one turn at a time.

    Attributes:
        messages: the dialogue so far, as chat messages. You may change it: the next turn prefills everything after the
            first change again.
    """

    def __init__(self, haast: Haast, messages: Sequence[Message] = ()) -> None:
        """`messages` start the dialogue (a system message, say). Raises PromptError if there is no chat template."""
        if not haast.tokenizer.chat_template:
            raise PromptError("the tokenizer has no chat template, which a dialogue needs: use Haast.generate")
        self.haast = haast
        self.messages: list[Message] = [dict(message) for message in messages]
        self._texts: list[list[int]] = []  # token ids after each turn, without those that a later one extends

    @property
    def blocks(self) -> list[int]:
        """The KV blocks that hold the dialogue; other texts with the same prefix share them."""
        with self.haast.target.lock:
            return self.haast.target.pool.blocks_of(self._texts[-1], self._key) if self._texts else []

    @property
    def nbytes(self) -> int:
        """Memory of these blocks in bytes."""
        return _bytes(self.haast, self.blocks)

    @property
    def _key(self) -> object:
        return self.haast.drafter.prefix_key

    def say(self, text: str, **settings: Unpack[Settings]) -> Generation:
        """Send the user's message and return the model's answer; both are added to the dialogue.

        Args:
            text: the user's message.
            **settings: see `haast.generation.Settings`.

        Raises:
            PromptError, KVPoolError, QueueFullError: see `Haast.generate`; the dialogue is unchanged.
        """
        stats = Stats()
        return collect(self.stream(text, stats=stats, **settings), stats)

    def stream(
        self, text: str, *, stats: Stats | None = None, **settings: Unpack[Settings]
    ) -> Generator[Piece, None, None]:
        """Like `say`, piece by piece. If the stream is closed early, the pieces so far are added to the dialogue."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.haast.encode(messages)
        return self._stream_turn(messages, prompt, self.haast.stream(prompt, stats=stats, **settings))

    def _stream_turn(
        self, messages: list[Message], prompt: list[int], pieces: Generator[Piece, None, None]
    ) -> Generator[Piece, None, None]:
        answer, generated, started = "", list[int](), True
        try:
            for piece in pieces:
                answer += piece.text
                generated.extend(piece.tokens)
                yield piece
        except QueueFullError:
            started = False
            raise
        finally:
            pieces.close()
            if started:
                self.messages = [*messages, {"role": "assistant", "content": answer}]
                with self.haast.target.lock:  # remember earlier texts that still have blocks of their own
                    blocks_of, tokens = self.haast.target.pool.blocks_of, [*prompt, *generated]
                    blocks = set(blocks_of(tokens, self._key))
                    earlier = (text for text in self._texts if set(blocks_of(text, self._key)) - blocks)
                    self._texts = [*earlier, tokens]

    def edit(self, number: int, text: str, **settings: Unpack[Settings]) -> Generation:
        """Replace the user's message `number`, drop all later messages, and return the model's new answer.

        Args:
            number: index of the message; -2 is the user's last one if the model has answered it.
            text: the new message.
            **settings: see `say`.

        Raises:
            ValueError: there is no such message, or it is not the user's. PromptError: see `say`. The dialogue is
                unchanged.
        """
        if not -len(self.messages) <= number < len(self.messages):
            raise ValueError(f"there is no message {number}: the dialogue has {len(self.messages)}")
        if self.messages[number]["role"] != "user":
            raise ValueError(f"message {number} is the {self.messages[number]['role']}'s: give one of the user's")
        original = self.messages
        self.messages = kept = original[: number % len(original)]
        try:
            return self.say(text, **settings)
        finally:
            if self.messages is kept:  # an error before the turn started
                self.messages = original

    def branch(self) -> Session:
        """A copy of the dialogue that continues independently; both share the KV blocks so far."""
        branch = Session(self.haast, deepcopy(self.messages))
        branch._texts = list(self._texts)
        return branch

    def release(self) -> None:
        """Free the blocks that no other text shares; the dialogue stays, and its next turn prefills them again."""
        with self.haast.target.lock:
            for text in reversed(self._texts):
                self.haast.target.pool.forget(text, self._key)
        self._texts = []


class Sessions:
    """Dialogues by name, whose KV blocks together stay within a memory limit.

    Args:
        haast: generates the answers.
        max_bytes: the limit, 1 or more. Above it, the blocks of the least recently used dialogues are freed; their
            messages are kept.
        messages: the first messages of every dialogue.
    """

    def __init__(self, haast: Haast, max_bytes: int = 1 << 30, messages: Sequence[Message] = ()) -> None:
        check_at_least("max_bytes", max_bytes)
        self._haast, self.max_bytes, self._first_messages = haast, max_bytes, list(messages)
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Memory of all KV blocks in bytes; shared blocks count once."""
        return _bytes(self._haast, {block for session in self._sessions.values() for block in session.blocks})

    def __len__(self) -> int:
        return len(self._sessions)

    def say(self, name: str, text: str, **settings: Unpack[Settings]) -> Generation:
        """One turn of the dialogue `name`, which is created if it does not exist. See `Session.say`."""
        session = self._sessions.get(name) or Session(self._haast, self._first_messages)
        answer = session.say(text, **settings)
        self._sessions[name] = session
        self._sessions.move_to_end(name)
        self._release_oldest()
        return answer

    def __getitem__(self, name: str) -> Session:
        """The dialogue `name`. Raises KeyError."""
        return self._sessions[name]

    def close(self, name: str) -> None:
        """Remove a dialogue. Raises KeyError."""
        del self._sessions[name]

    def _release_oldest(self) -> None:
        for session in list(self._sessions.values()):
            if self.nbytes <= self.max_bytes:
                return
            session.release()


def _bytes(haast: Haast, blocks: Collection[int]) -> int:
    """Memory of the blocks in bytes, in the target's and the drafter's KV caches."""
    caches = (haast.target.cache, *haast.drafter.caches)
    return len(blocks) * BLOCK * sum(cache.bytes_per_token for cache in caches)
