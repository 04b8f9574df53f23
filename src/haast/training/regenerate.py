"""The target answers prompts itself: the text that a head is trained on (EAGLE, arXiv 2401.15077, section 3.2).

Owns batched answering with rows that leave and enter. Knows no heads and no files. An answer is a function of
(seed, place of its prompt in the list, target) alone: every draw is keyed as in `sampling`, so neither the batch
size nor an interruption changes it (where the target's rows are independent; otherwise up to floating-point ties).

    answers file   see `answers`
    features       optional shards, 256 answers each; what a kill cut off, `features.extract` computes later
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from haast.prompts import Prompt
from haast.target import Target
from haast.training.answers import AnswersFile
from haast.training.asking import AnswerProgress, Outcome, Question, Questions, RegenerateConfig
from haast.training.batches import Example
from haast.training.chat import check_template, encode_prompt, tokenizer_hash
from haast.training.checkpoints import write_probe
from haast.training.features import ShardIdentity, ShardWriter, teacher_topk
from haast.training.frozen import end_tokens
from haast.tree import DraftTree


@dataclass
class _Answer:
    """One answer in the making."""

    question: Question
    prompt_tokens: list[int]
    temperature: float
    limit: int  # new tokens at most
    tokens: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)  # (n, hidden) float16 each
    teacher: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def ended(self, end_ids: Sequence[int]) -> bool:
        return self.tokens[-1] in end_ids or len(self.tokens) >= self.limit

    def example(self) -> Example:
        """All but the last token's feature, which nothing computed."""
        before, tokens = len(self.prompt_tokens), self.prompt_tokens + self.tokens
        features, (ids, probs) = torch.cat(self.features), self.teacher[0]
        all_ids = ids.new_zeros(len(tokens), ids.shape[1])
        all_probs = probs.new_zeros(len(tokens), ids.shape[1])
        all_ids[before - 1 : -1] = torch.cat([i for i, _ in self.teacher])
        all_probs[before - 1 : -1] = torch.cat([p for _, p in self.teacher])
        supervised = torch.zeros(len(tokens), dtype=torch.uint8)
        supervised[before:] = 1
        padded = torch.cat([features, features.new_zeros(1, features.shape[1])])
        return Example(torch.tensor(tokens, dtype=torch.int32), padded, supervised, all_ids, all_probs)


class _Batch:
    """Rows of answers over one cache."""

    def __init__(self, target: Target, config: RegenerateConfig, end_ids: Sequence[int]) -> None:
        self._target, self._config, self._end_ids = target, config, end_ids
        self._cache = target.new_cache(config.batch)
        self._rows: list[_Answer | None] = [None] * config.batch

    def run(self, take: Callable[[], _Answer | None]) -> Iterator[_Answer]:
        """Answer everything; yields each answer as it ends, and asks for more (later turns too) when it goes on."""
        while True:
            for row, answer in enumerate(self._rows):
                while answer is None and (entering := take()) is not None:
                    with self._target.step_threads():
                        self._enter(row, entering)
                    if entering.ended(self._end_ids):
                        yield entering
                        continue
                    self._rows[row] = answer = entering
            if not self._narrow():
                return
            with self._target.step_threads():
                self._step()
            for row, answer in enumerate(self._rows):
                if answer is not None and answer.ended(self._end_ids):
                    self._rows[row] = None
                    yield answer

    def _enter(self, row: int, answer: _Answer) -> None:
        small = self._target.new_cache(1, len(answer.prompt_tokens))
        prompt = torch.tensor([answer.prompt_tokens], device=self._target.device)
        output = self._target.forward(DraftTree.chain(prompt), small, last_only=True)
        small.commit([range(prompt.shape[1])])
        self._cache.copy_row(small, 0, row)
        self._extend([answer], output.logits[:, 0], output.features)

    def _narrow(self) -> int:
        """Give up empty rows once half of them are; returns how many rows are left."""
        busy = [row for row, answer in enumerate(self._rows) if answer is not None]
        if busy and 2 * len(busy) <= len(self._rows):
            cache = self._target.new_cache(len(busy), self._cache.longest)
            for place, row in enumerate(busy):
                cache.copy_row(self._cache, row, place)
            self._cache, self._rows = cache, [self._rows[row] for row in busy]
        return len(busy)

    def _step(self) -> None:
        tokens = torch.tensor([[0 if answer is None else answer.tokens[-1]] for answer in self._rows])
        output = self._target.forward(DraftTree.chain(tokens.to(self._target.device)), self._cache)
        self._cache.commit([None if answer is None else [0] for answer in self._rows])
        busy = [row for row, answer in enumerate(self._rows) if answer is not None]
        self._extend([a for a in self._rows if a is not None], output.logits[busy, 0], output.features[busy])

    def _extend(self, answers: list[_Answer], logits: Tensor, features: Tensor) -> None:
        """Choose each answer's next token from logits (n, vocab); features are (n, nodes, hidden)."""
        points = [a.question.draw(self._config.seed, len(a.prompt_tokens) + len(a.tokens)) for a in answers]
        chosen = choose_batch(logits, [a.temperature for a in answers], points).tolist()
        for answer, token in zip(answers, chosen, strict=True):
            answer.tokens.append(token)
        if self._config.features_dir is not None:
            ids, probs = teacher_topk(logits, self._config.topk)
            stored = features.half().cpu()
            for row, answer in enumerate(answers):
                answer.features.append(stored[row].clone())
                answer.teacher.append((ids[row : row + 1], probs[row : row + 1]))


def choose_batch(logits: Tensor, temperatures: Sequence[float], points: Sequence[float]) -> Tensor:
    """What `sampling.Sampler.choose` chooses (temperature only), for many rows at once.

    Args:
        logits: (n, vocab).
        temperatures: n; 0 is greedy.
        points: n keyed draws in [0, 1).

    Returns:
        (n,) int64.
    """
    tokens = logits.argmax(-1)
    warm = [row for row, temperature in enumerate(temperatures) if temperature > 0]
    if not warm:
        return tokens
    scores = logits[warm]
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    heat = torch.tensor([temperatures[row] for row in warm], dtype=scores.dtype, device=scores.device)
    law = (scores / heat.unsqueeze(1)).double().softmax(-1).cumsum(-1)
    total = law[:, -1:]
    where = torch.tensor([[points[row]] for row in warm], dtype=torch.float64, device=scores.device) * total
    drawn = torch.searchsorted(law, where, right=True)[:, 0]
    last = (law < total).sum(-1)  # where rounding put the point on the end of the scale
    tokens[warm] = torch.where(drawn < law.shape[1], drawn, last)
    return tokens


def regenerate(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    out_path: Path,
    config: RegenerateConfig,
    *,
    name: str = "",
    quiet: bool = False,
) -> Outcome:
    """Let the target answer every prompt's turns, appending to `out_path`; done ones are skipped.

    Args:
        target: the model.
        tokenizer: its tokenizer.
        prompts: in the same order on every run: a prompt's draws are keyed by its place.
        out_path: JSON lines, see `answers`.
        config: settings.
        name: the target's name, stored with answers and in feature shards.
        quiet: no progress line.

    Returns:
        The counts. Prompts longer than `max_prompt_tokens`, or than the context, are left out.

    Raises:
        ValueError: a folder that cannot be written or a chat template without a place for answers (before the model
            runs), two prompts of one id, a full disk, or another run is writing to `out_path`.
    """
    for folder in (out_path.parent, *([config.features_dir] if config.features_dir else [])):
        write_probe(folder)
    check_template(tokenizer)
    ends, digest, added = end_tokens(target), tokenizer_hash(tokenizer), 0
    with ExitStack() as stack:
        file = stack.enter_context(AnswersFile(out_path, name, digest))
        questions = Questions(prompts, config.turns, file.records)
        progress = stack.enter_context(AnswerProgress(questions, quiet))
        writer = None
        if config.features_dir is not None:
            identity = ShardIdentity.of(target, name, config.topk)
            writer = stack.enter_context(ShardWriter(config.features_dir, identity, config.max_gb))
        waiting = _waiting(target, tokenizer, questions, config)
        for answer in _Batch(target, config, ends).run(waiting):
            text = str(tokenizer.decode(answer.tokens, skip_special_tokens=True))
            finished = answer.tokens[-1] in ends
            record = answer.question.record(config, name, digest, text, answer.tokens, finished)
            file.add(record)
            questions.answered(answer.question)
            if writer is not None:
                writer.add(answer.example(), record)
            added += 1
            progress.step(len(answer.tokens))
    return Outcome(questions.total, questions.before, added, tokens=progress.tokens)


def _waiting(
    target: Target, tokenizer: PreTrainedTokenizerBase, questions: Questions, config: RegenerateConfig
) -> Callable[[], _Answer | None]:
    """Takes the next question that has room for an answer."""
    context = target.context_length

    def take() -> _Answer | None:
        while (question := questions.take()) is not None:
            tokens = encode_prompt(tokenizer, question.turns, config.thinking)
            room = config.max_new_tokens if context is None else min(config.max_new_tokens, context - len(tokens))
            if len(tokens) <= config.max_prompt_tokens and room > 0:
                return _Answer(question, tokens, config.temperature(question.index), room)
        return None

    return take
