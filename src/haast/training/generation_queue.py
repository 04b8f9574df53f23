"""Queue of user turns for answer generation, and the answer records that are stored.

Owns the order of turns and the keys of random draws. Does not run a model: `regenerate` uses the target in this
process, `endpoint` a server, each in an `AnswerRun`. A conversation's later turn waits until the earlier one has an
answer, from this run or an earlier one, since the target's answers are part of the next prompt.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from haast.progress import Progress
from haast.prompts import Prompt
from haast.sampling import keyed_uniform
from haast.stats import loop_share, loop_start
from haast.training.answers import AnswersFile
from haast.training.chat import check_template, encode_prompt, tokenizer_hash
from haast.training.checkpoints import write_probe
from haast.training.config import RegenerateConfig
from haast.training.mix import select

_SERVER_SEED_POSITION = 2**41  # position key, beyond any text, of the draw that seeds a server's sampling
POSITIONS_PER_TURN = 2**42  # position keys reserved for each turn


@dataclass(frozen=True)
class Question:
    """One user turn that waits for its answer."""

    index: int  # of the prompt in the list; keys its random draws
    turn: int  # from 0
    prompt: Prompt
    history: tuple[str, ...] = ()  # earlier turns: user, assistant, ...

    @property
    def id(self) -> str:
        """The prompt's id for the first turn, with #2, #3, ... for later ones."""
        return turn_id(self.prompt, self.turn)

    @property
    def turns(self) -> list[str]:
        """The conversation, this question last."""
        return [*self.history, self.prompt.turns[self.turn]]

    def draw(self, seed: int, position: int) -> float:
        """The random draw in [0, 1) for the token at `position`, keyed by seed, prompt and turn."""
        return keyed_uniform(seed, self.index, self.turn * POSITIONS_PER_TURN + position)

    def seed(self, seed: int) -> int:
        """A 31-bit seed for a server's sampling of this answer."""
        return int(self.draw(seed, _SERVER_SEED_POSITION) * 2**31)


def turn_id(prompt: Prompt, turn: int) -> str:
    """The id of the record that answers `turn` (from 0) of a prompt."""
    return prompt.id if turn == 0 else f"{prompt.id}#{turn + 1}"


class Questions:
    """The turns without an answer, in order; a conversation's next turn is queued once the previous one has an answer.

    Args:
        prompts: in the same order on every run.
        turns: maximum number of turns per prompt.
        records: existing answers by id. `AnswersFile.records`, which grows.
        order: indices of the prompts that are asked; None is all of them in their order.

    Raises:
        ValueError: two turns have the same id, or an existing answer is for another prompt with the same id.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        turns: int,
        records: dict[str, dict[str, Any]],
        order: Sequence[int] | None = None,
    ) -> None:
        asked = [(index, prompts[index]) for index in (range(len(prompts)) if order is None else order)]
        ids = [turn_id(prompt, turn) for _, prompt in asked for turn in range(min(turns, len(prompt.turns)))]
        twice = next((name for name, count in Counter(ids).items() if count > 1), None)
        if twice is not None:
            raise ValueError(
                f"two prompts have the same id {twice!r}: give each line its own id, since runs resume by id"
            )
        self.total = len(ids)
        self.before = sum(name in records for name in ids)
        self._turns, self._records = turns, records
        firsts = (self._first_unanswered(index, prompt) for index, prompt in asked)
        self._waiting = deque(question for question in firsts if question is not None)

    def take(self) -> Question | None:
        """The next question; None if none can be answered now."""
        return self._waiting.popleft() if self._waiting else None

    def mark_answered(self, question: Question) -> None:
        """Queue the conversation's next turn, before all others; the question's record must be stored."""
        following = self._first_unanswered(question.index, question.prompt)
        if following is not None:
            self._waiting.appendleft(following)

    def _first_unanswered(self, index: int, prompt: Prompt) -> Question | None:
        """The prompt's first turn without an answer; None if all have one, or the last answer ended in a loop."""
        history: tuple[str, ...] = ()
        for turn in range(min(self._turns, len(prompt.turns))):
            record = self._records.get(turn_id(prompt, turn))
            if record is None:
                return Question(index, turn, prompt, history)
            if record.get("prompt", prompt.turns[turn]) != prompt.turns[turn]:
                raise ValueError(
                    f"the answers file has an answer {record['id']!r} to another prompt with the same id: give another "
                    f"--out, or prompts with unique ids"
                )
            if record.get("looped"):
                return None
            history = (*history, prompt.turns[turn], str(record.get("response", "")))
        return None


@dataclass(frozen=True)
class Outcome:
    """Counts of a run, in user turns."""

    total: int
    before: int  # answered in earlier runs
    added: int
    failed: int = 0  # refused by a server, or no reply
    last_error: str = ""  # message of the last failure
    tokens: int = 0  # of the answers added
    looped: int = 0  # added answers that were cut where they began to repeat themselves
    duplicates: int = 0  # prompts, not counted in `total`, that were left out as near-duplicates

    @property
    def left_out(self) -> int:
        """Turns that are too long, or that follow a turn without an answer or with a loop."""
        return self.total - self.before - self.added - self.failed


class AnswerRun:
    """One run over an answers file: hands out questions and stores their answers. Use `with`.

    Args:
        tokenizer: the target's.
        prompts: in the same order on every run, since a prompt's index keys its random draws.
        out_path: JSON lines, see `answers`; new answers are appended, prompts with an answer are skipped.
        config: settings; an endpoint does not use `batch` and the settings of features.
        name: the target's name, stored with answers and in feature shards.
        quiet: no progress output.

    Raises:
        ValueError: on entering, a folder that cannot be written, a chat template that does not mark answers, or an
            error of `AnswersFile` or `Questions`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        out_path: Path,
        config: RegenerateConfig,
        name: str = "",
        quiet: bool = False,
    ) -> None:
        self.tokenizer, self.config, self.name = tokenizer, config, name
        self._prompts, self._path, self.quiet = prompts, out_path, quiet
        self._digest = tokenizer_hash(tokenizer)
        self.added = self._looped = 0

    def __enter__(self) -> AnswerRun:
        write_probe(self._path.parent)
        check_template(self.tokenizer)
        with ExitStack() as stack:
            self._file = stack.enter_context(AnswersFile(self._path, self.name, self._digest))
            self._selection = select(self._prompts, self.config)
            self.questions = Questions(self._prompts, self.config.turns, self._file.records, self._selection.order)
            total, before = self.questions.total, self.questions.before
            progress = Progress("answers", "answers", total, before, rate="tokens", quiet=self.quiet)
            self._progress = stack.enter_context(progress)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def take(self, context: int | None = None) -> tuple[Question, list[int], int] | None:
        """The next question that is not too long, its prompt's token ids, and the maximum length of its answer.

        None if no question can be answered now. `context` is the model's context length.
        """
        while (question := self.questions.take()) is not None:
            tokens = encode_prompt(self.tokenizer, question.turns, self.config.thinking)
            limit = self.config.length(question.index)
            if context is not None:
                limit = min(limit, context - len(tokens))
            if len(tokens) <= self.config.max_prompt_tokens and limit > 0:
                return question, tokens, limit
        return None

    def keep(self, question: Question, text: str, tokens: list[int], finished: bool, **more: Any) -> dict[str, Any]:
        """Store the answer as a record (format: see `answers`), with the fields of `more` at its end; returns it.

        Unless `config.loops` is "keep", an answer that ends in a loop is stored up to the first repetition.
        """
        extra, thinking = question.prompt.extra, self.config.thinking
        start = loop_start(tokens) if self.config.loops == "cut" else None
        if start is not None:
            tokens, finished, more = tokens[:start], False, {**more, "looped": True}
            text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
            self._looped += 1
        record = {
            "id": question.id,
            "model": self.name,
            "tokenizer": self._digest,
            "category": question.prompt.category,
            "source": extra.get("source", ""),
            "licence": extra.get("licence", ""),
            **({"history": list(question.history)} if question.history else {}),
            "prompt": question.turns[-1],
            "temperature": self.config.temperature(question.index),
            **({} if thinking is None else {"thinking": thinking}),
            "response": text,
            "response_ids": tokens,
            "finished": finished,
            "loop_share": round(loop_share(tokens), 4),
            **more,
        }
        self._file.add(record)
        self.questions.mark_answered(question)
        self.added += 1
        self._progress.step(counted=len(tokens))
        return record

    @property
    def records(self) -> list[dict[str, Any]]:
        """All answers in the file, with those of earlier runs."""
        return list(self._file.records.values())

    def outcome(self, failed: int = 0, last_error: str = "") -> Outcome:
        """The counts so far."""
        questions, dropped = self.questions, (self._looped, self._selection.duplicates)
        counted = self._progress.counted
        return Outcome(questions.total, questions.before, self.added, failed, last_error, counted, *dropped)
