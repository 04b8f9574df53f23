"""What is asked of the target: which user turns wait for an answer, and the records that answers become.

Owns the order of turns and the keys of draws. Knows no model: `regenerate` answers with the target in this process,
`endpoint` with a server, each in an `AnswerRun`. A conversation's later turn waits until the earlier one is answered,
now or in an earlier run, since the target's own words are part of what it is asked.
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
from haast.stats import loop_share
from haast.training.answers import AnswersFile
from haast.training.chat import check_template, encode_prompt, tokenizer_hash
from haast.training.checkpoints import write_probe
from haast.training.config import RegenerateConfig

_SEED_DRAW = 2**41  # a position no text reaches: the draw that seeds a server's
TURN_DRAWS = 2**42  # positions between the draws of one turn and the next


@dataclass(frozen=True)
class Question:
    """One user turn that waits for its answer."""

    index: int  # the prompt's place in the list, which keys its draws
    turn: int  # from 0
    prompt: Prompt
    history: tuple[str, ...] = ()  # user, assistant, ... before it

    @property
    def id(self) -> str:
        """The prompt's own for the first turn, then followed by #2, #3, ..."""
        return turn_id(self.prompt, self.turn)

    @property
    def turns(self) -> list[str]:
        """All that was said, this question last."""
        return [*self.history, self.prompt.turns[self.turn]]

    def draw(self, seed: int, position: int) -> float:
        """The keyed draw for the token at `position`."""
        return keyed_uniform(seed, self.index, self.turn * TURN_DRAWS + position)

    def seed(self, seed: int) -> int:
        """31 bits that seed a server's draws for this answer."""
        return int(self.draw(seed, _SEED_DRAW) * 2**31)


def turn_id(prompt: Prompt, turn: int) -> str:
    """A record's id."""
    return prompt.id if turn == 0 else f"{prompt.id}#{turn + 1}"


class Questions:
    """The turns that wait, in order; a conversation's next turn comes as soon as the one before is answered.

    Args:
        prompts: in the same order on every run.
        turns: answered of each, at most.
        records: answers there, by id. `AnswersFile.records`, which grows.

    Raises:
        ValueError: two turns of one id, or an answer there is to another question of the same id.
    """

    def __init__(self, prompts: Sequence[Prompt], turns: int, records: dict[str, dict[str, Any]]) -> None:
        ids = [turn_id(prompt, turn) for prompt in prompts for turn in range(min(turns, len(prompt.turns)))]
        twice = next((name for name, count in Counter(ids).items() if count > 1), None)
        if twice is not None:
            raise ValueError(
                f"two prompts have the same id {twice!r}: give each line its own, answers are resumed by id"
            )
        self.total = len(ids)
        self.before = sum(name in records for name in ids)
        self._turns, self._records = turns, records
        firsts = (self._open(index, prompt) for index, prompt in enumerate(prompts))
        self._waiting = deque(question for question in firsts if question is not None)

    def take(self) -> Question | None:
        """The next one; None where none waits now."""
        return self._waiting.popleft() if self._waiting else None

    def answered(self, question: Question) -> None:
        """Its record is there: queue the conversation's next turn, before all others."""
        following = self._open(question.index, question.prompt)
        if following is not None:
            self._waiting.appendleft(following)

    def _open(self, index: int, prompt: Prompt) -> Question | None:
        """The first turn without an answer."""
        history: tuple[str, ...] = ()
        for turn in range(min(self._turns, len(prompt.turns))):
            record = self._records.get(turn_id(prompt, turn))
            if record is None:
                return Question(index, turn, prompt, history)
            if record.get("prompt", prompt.turns[turn]) != prompt.turns[turn]:
                raise ValueError(
                    f"the answers file holds an answer {record['id']!r} to another prompt than the one of that id now: "
                    f"give another --out, or prompts with ids of their own"
                )
            history = (*history, prompt.turns[turn], str(record.get("response", "")))
        return None


@dataclass(frozen=True)
class Outcome:
    """What a run did, in turns."""

    total: int
    before: int  # answered in earlier runs
    added: int
    failed: int = 0  # refused by a server, or never answered
    complaint: str = ""  # the last failure's
    tokens: int = 0  # of the answers added

    @property
    def left_out(self) -> int:
        """Too long, or after a turn that has no answer."""
        return self.total - self.before - self.added - self.failed


class AnswerRun:
    """One run over an answers file: hands out questions and keeps their answers. Use `with`.

    Args:
        tokenizer: the target's.
        prompts: in the same order on every run: a prompt's draws are keyed by its place.
        out_path: JSON lines, see `answers`; new ones are appended, done ones are skipped.
        config: settings; for an endpoint, `batch` and the features are without meaning.
        name: the target's name, stored with answers and in feature shards.
        quiet: no progress bar or lines.

    Raises:
        ValueError: on entering, a folder that cannot be written, a chat template without a place for answers, or what
            `AnswersFile` and `Questions` refuse.
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
        self.added = 0

    def __enter__(self) -> AnswerRun:
        write_probe(self._path.parent)
        check_template(self.tokenizer)
        with ExitStack() as stack:
            self._file = stack.enter_context(AnswersFile(self._path, self.name, self._digest))
            self.questions = Questions(self._prompts, self.config.turns, self._file.records)
            total, before = self.questions.total, self.questions.before
            progress = Progress("answers", "answers", total, before, rate="tokens", quiet=self.quiet)
            self._progress = stack.enter_context(progress)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def take(self, context: int | None = None) -> tuple[Question, list[int], int] | None:
        """The next question that is not too long, as the model reads it, and how many tokens its answer may have."""
        while (question := self.questions.take()) is not None:
            tokens = encode_prompt(self.tokenizer, question.turns, self.config.thinking)
            limit = self.config.max_new_tokens
            if context is not None:
                limit = min(limit, context - len(tokens))
            if len(tokens) <= self.config.max_prompt_tokens and limit > 0:
                return question, tokens, limit
        return None

    def keep(self, question: Question, text: str, tokens: list[int], finished: bool, **more: Any) -> None:
        """Store an answer's record, as `answers` describes it, with `more` at its end."""
        extra, thinking = question.prompt.extra, self.config.thinking
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
        self.questions.answered(question)
        self.added += 1
        self._progress.step(counted=len(tokens))

    @property
    def records(self) -> list[dict[str, Any]]:
        """All answers in the file, those of earlier runs too."""
        return list(self._file.records.values())

    def outcome(self, failed: int = 0, complaint: str = "") -> Outcome:
        """The counts so far."""
        questions = self.questions
        return Outcome(questions.total, questions.before, self.added, failed, complaint, self._progress.counted)
