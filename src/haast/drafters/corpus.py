"""A corpus of earlier answers to draft from: a file that grows with what is generated, and its index.

Owns the file (JSON lines: a header, then one answer of token ids per line), its bound, and the search for the longest
match of a text's end. One process at a time uses a file; a second one is refused. Answers are appended as requests end;
the oldest are dropped, and the file is rewritten atomically, when it is twice as long as the bound. A file that can't
be written any more ends no request: the corpus goes on in memory, with a warning. Drafting from other
users' answers does not change a text, but lets times depend on them: give each user a corpus of their own.
"""

from __future__ import annotations

import heapq
import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from haast.drafters.candidates import Candidates
from haast.drafters.suffix_index import MOST_COST, SuffixIndex, Waiting
from haast.files import write_text
from haast.jsonl_log import JsonlLog
from haast.tuning.online import MatchOdds

_LOG = logging.getLogger(__name__)
FORMAT = "haast-corpus-1"
MOST_TOKENS = 1 << 18  # kept at least, if there are so many; about 40 MB of memory
_GRAM = 4  # least length of a match
_LONGEST = 32  # tokens of a match that are compared
_PLACES = 16  # latest occurrences that are considered
_END = -1  # separates answers


class Corpus:
    """An open corpus. Use `close` or a `with` block to release its file. Any thread may call it.

    Args:
        path: created if missing.
        vocab_size: of the target; a corpus of another vocabulary is refused.
        most: tokens to keep.

    Raises:
        ValueError: another process uses the file, or it is not a corpus of this vocabulary.
    """

    def __init__(self, path: Path, vocab_size: int, most: int = MOST_TOKENS) -> None:
        self.path, self._vocab_size, self._most = path, vocab_size, most
        self._lock, self._files, self._kept = threading.Lock(), ExitStack(), True
        self._read(self._open())

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; what is added afterwards is not kept."""
        self._kept = False
        self._files.close()

    @property
    def tokens(self) -> int:
        """Number of tokens in the index, one more per answer included."""
        return len(self._text)

    def add(self, answer: Sequence[int]) -> None:
        """Append an answer to the file and the index. Answers too short to match are left out.

        An answer may have a few tokens after its end: those of the last step that a stop rule cut off.
        """
        if len(answer) <= _GRAM:
            return
        with self._lock:
            if self._kept:
                self._keep(answer)
            self._index(answer)
            if len(self._text) > 2 * self._most:
                self._shorten()

    def match(self, text: Sequence[int]) -> tuple[int, list[int]]:
        """Length of the longest match of the text's end, and the positions after its latest occurrences; or (0, [])."""
        if len(text) < _GRAM:
            return 0, []
        best, places = 0, list[int]()
        place = self._last.get(hash(tuple(text[-_GRAM:])), 0)
        for _ in range(_PLACES):
            if not place:
                break
            length = self._shared(text, place)
            if length > best:
                best, places = length, []
            if length == best:
                places.append(place)
            place = self._before[place - 1]
        return (best, places) if best >= _GRAM else (0, [])

    def following(self, places: Sequence[int]) -> int:
        """The token that is most often at these positions."""
        return Counter(self._text[place] for place in places).most_common(1)[0][0]

    def candidates(self, text: Sequence[int], odds: MatchOdds, most: int) -> Candidates:
        """At most `most` nodes that followed the longest match, weighted by how often each did."""
        length, places = self.match(text)
        found, waiting = Candidates(), Waiting()
        groups = {0: places}  # number of a waiting continuation -> positions of its token
        self._continue(waiting, groups, 0.0, -1, 0, length, odds)
        while waiting.heap and len(found) < most:
            cost, _, parent, token, group, length = heapq.heappop(waiting.heap)
            place = found.add(token, parent, -cost)
            groups[group] = [position + 1 for position in groups[group]]
            self._continue(waiting, groups, cost, place, group, length + 1, odds)
        return found

    def _continue(
        self, waiting: Waiting, groups: dict[int, list[int]], cost: float, parent: int, group: int, length: int,
        odds: MatchOdds,
    ) -> None:  # fmt: skip
        places = groups[group]
        if not places:
            return
        cost -= math.log(odds.chance(length))
        following = dict[int, list[int]]()
        for place in places:
            following.setdefault(self._text[place], []).append(place)
        for token, own in following.items():
            more = cost - math.log(len(own) / len(places))
            if token != _END and more <= MOST_COST:
                groups[len(groups)] = own
                waiting.add(more, parent, token, len(groups) - 1, length)

    def _shared(self, text: Sequence[int], place: int) -> int:
        """Number of equal tokens before the end of the text and before a position of the corpus."""
        corpus, length = self._text, 0
        most = min(_LONGEST, len(text), place)
        while length < most and corpus[place - 1 - length] == text[-1 - length]:
            length += 1
        return length

    def _open(self) -> list[list[int]]:
        """Open and lock the file; returns its answers. Raises ValueError."""
        remedy = "give another corpus file"
        self._log = JsonlLog(self.path, b'{"tokens"', b'{"format"', remedy=remedy, synced=False)
        self._files.enter_context(self._log)
        try:
            return self._checked()
        except ValueError:
            self._files.close()
            raise

    def _read(self, answers: Sequence[Sequence[int]]) -> None:
        """Index these answers alone."""
        self._text: list[int] = []
        self._before: list[int] = []  # [p - 1]: the earlier position after the tokens before position p; 0: none
        self._last: dict[int, int] = {}  # hash of the tokens before a position -> the latest such position
        for answer in answers:
            self._index(answer)
        if len(self._text) > 2 * self._most:
            self._shorten()

    def _keep(self, answer: Sequence[int]) -> None:
        try:
            self._log.add({"tokens": list(answer)})
        except ValueError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Go on in memory. The file is released at once, so that no line follows one that is incomplete."""
        self.close()
        _LOG.warning("answers are no longer added to the corpus: %s", error)

    def _checked(self) -> list[list[int]]:
        """The answers of the file, which gets its header if it is new. Raises ValueError if it is no such corpus."""
        header = {"format": FORMAT, "vocabulary": self._vocab_size}
        if not self._log.values:
            self._log.add(header)
            return []
        found, *rest = self._log.values
        if found != header:
            raise ValueError(
                f"{self.path} is not a corpus for a vocabulary of {self._vocab_size} tokens (it begins with {found}): "
                f"give another corpus file"
            )
        for number, line in enumerate(rest, start=2):
            tokens = line.get("tokens")
            valid = isinstance(tokens, list) and all(
                type(token) is int and 0 <= token < self._vocab_size for token in tokens
            )
            if not valid:
                raise ValueError(f"{self.path}, line {number}: not an answer of token ids: remove the line")
        return [line["tokens"] for line in rest]

    def _index(self, answer: Sequence[int]) -> None:
        start = len(self._text)
        self._text.extend(answer)
        self._text.append(_END)
        self._before.extend([0] * (len(answer) + 1))
        for end in range(start + _GRAM, start + len(answer) + 1):
            key = hash(tuple(self._text[end - _GRAM : end]))
            self._before[end - 1] = self._last.get(key, 0)
            self._last[key] = end

    def _shorten(self) -> None:
        """Keep the newest answers, in the file and in the index."""
        first = self._text.index(_END, len(self._text) - self._most) + 1
        answers: list[list[int]] = [[]]
        for token in self._text[first:]:
            if token == _END:
                answers.append([])
            else:
                answers[-1].append(token)
        self._read(answers[:-1])
        if self._kept:
            self._rewrite(answers[:-1])

    def _rewrite(self, answers: Sequence[Sequence[int]]) -> None:
        lines = [{"format": FORMAT, "vocabulary": self._vocab_size}, *({"tokens": answer} for answer in answers)]
        try:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
            self._files.close()  # the lock is of the replaced file
            self._open()
        except (OSError, ValueError) as error:
            self._give_up(error)


class CorpusIndex(SuffixIndex):
    """A request's text together with a corpus: the nodes of both compete.

    Args:
        corpus: searched for the text's end.
        least, branches: see `SuffixIndex`.
    """

    def __init__(self, corpus: Corpus, least: int, branches: int) -> None:
        super().__init__(least, branches)
        self._corpus, self._corpus_odds = corpus, MatchOdds()
        self._answer: list[int] = []

    def extend(self, tokens: Sequence[int], answer: bool = False) -> None:
        for token in tokens:
            if answer:
                self._answer = self._answer or self.text[-1:]  # the prefill's token is the answer's first
                self._answer.append(int(token))
                length, places = self._corpus.match(self.text)
                if length:
                    self._corpus_odds.count(length, self._corpus.following(places) == token)
            super().extend([token], answer)

    def first_chance(self) -> float:
        length, _ = self._corpus.match(self.text)
        return max(super().first_chance(), self._corpus_odds.chance(length) if length else 0.0)

    def candidates(self, most: int) -> Candidates:
        copies = self._corpus.candidates(self.text, self._corpus_odds, most)
        return super().candidates(most).merged(copies).best(most)

    def save(self) -> None:
        """Add the answer to the corpus. A preempted request begins again with its answer in the prompt."""
        self._corpus.add(self._answer)
        self._answer = []
