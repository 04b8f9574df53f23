"""The target answers prompts itself: the text that a head is trained on (EAGLE, arXiv 2401.15077, section 3.2).

Owns batched answering with rows that leave and enter, and the answers file. Knows no heads. An answer is a function of
(seed, place of its prompt in the list, target) alone: every draw is keyed as in `sampling`, so neither the batch
size nor an interruption changes it (where the target's rows are independent; otherwise up to floating-point ties).

    answers file   one JSON line per answer, flushed and synced as it ends; a torn last line is dropped on resume
    features       optional shards, 256 answers each; what a kill cut off, `features.extract` computes later
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from haast.prompts import Prompt
from haast.sampling import keyed_uniform
from haast.target import Target
from haast.training.batches import Example
from haast.training.checkpoints import write_probe
from haast.training.data import encode_prompt
from haast.training.features import ShardIdentity, ShardWriter, teacher_topk
from haast.training.frozen import end_tokens
from haast.training.report import Heartbeat, RateColumn
from haast.tree import DraftTree

_RECORD_BEGINS = b'{"id": '
_TEMPERATURE_DRAW = 2**40  # a position no text reaches: the draw that picks an answer's temperature


@dataclass(frozen=True)
class RegenerateConfig:
    """How answers are made. `temperatures` are (temperature, share) pairs; each prompt draws one."""

    batch: int = 32
    max_new_tokens: int = 256
    max_prompt_tokens: int = 1024
    temperatures: tuple[tuple[float, float], ...] = ((0.0, 0.5), (0.7, 0.25), (1.0, 0.25))
    seed: int = 0
    features_dir: Path | None = None
    topk: int = 16
    max_gb: float = 20.0

    def __post_init__(self) -> None:
        for name in ("batch", "max_new_tokens", "max_prompt_tokens", "topk", "max_gb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed in regeneration: give a value above 0")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is not allowed: give 0 or above")
        ok = all(t >= 0 and math.isfinite(t) and 0 < share < math.inf for t, share in self.temperatures)
        if not self.temperatures or not ok:
            raise ValueError(
                f"temperatures={self.temperatures} is not allowed: give (temperature 0 or above, share above 0) pairs"
            )

    def temperature(self, index: int) -> float:
        """The temperature of prompt `index`."""
        point = keyed_uniform(self.seed, index, _TEMPERATURE_DRAW) * sum(share for _, share in self.temperatures)
        for temperature, share in self.temperatures:
            if point < share:
                return temperature
            point -= share
        return self.temperatures[-1][0]


@dataclass
class _Answer:
    """One answer in the making."""

    index: int
    prompt: Prompt
    prompt_tokens: list[int]
    temperature: float
    limit: int  # new tokens at most
    tokens: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)  # (n, hidden) float16 each
    teacher: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def ended(self, end_ids: Sequence[int]) -> bool:
        return self.tokens[-1] in end_ids or len(self.tokens) >= self.limit

    def record(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], model: str) -> dict[str, Any]:
        extra = self.prompt.extra
        return {
            "id": self.prompt.id,
            "model": model,
            "category": self.prompt.category,
            "source": extra.get("source", ""),
            "licence": extra.get("licence", ""),
            "prompt": self.prompt.turns[0],
            "temperature": self.temperature,
            "response": str(tokenizer.decode(self.tokens, skip_special_tokens=True)),
            "response_ids": self.tokens,
            "finished": self.tokens[-1] in end_ids,
        }

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

    def run(self, waiting: Iterator[_Answer]) -> Iterator[_Answer]:
        """Answer everything; yields each answer as it ends."""
        while True:
            for row, answer in enumerate(self._rows):
                while answer is None and (entering := next(waiting, None)) is not None:
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
        points = [keyed_uniform(self._config.seed, a.index, len(a.prompt_tokens) + len(a.tokens)) for a in answers]
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


def mend_answers(path: Path) -> list[dict[str, Any]]:
    """Read an answers file of an interrupted run, cutting a torn last line off the file.

    Only what a kill leaves is cut: a tail without its newline that begins as a record does.

    Raises:
        ValueError: a line is no answer record (the message has its number); the file is left as it is.
    """
    if not path.exists():
        return []
    content, kept, records = path.read_bytes(), 0, []
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n") and _RECORD_BEGINS.startswith(line[: len(_RECORD_BEGINS)]):
            break
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}): mend or remove the line") from error
        if not isinstance(record, dict) or not line.endswith(b"\n"):
            raise ValueError(f"{path}, line {number}: no answer record: is this an answers file? Give another --out")
        records.append(record)
        kept += len(line)
    if kept < len(content):
        os.truncate(path, kept)
    return records


def regenerate(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    out_path: Path,
    config: RegenerateConfig,
    *,
    name: str = "",
    quiet: bool = False,
) -> int:
    """Let the target answer the first turn of every prompt, appending to `out_path`; done ones are skipped.

    Args:
        target: the model.
        tokenizer: its tokenizer.
        prompts: in the same order on every run: a prompt's draws are keyed by its place.
        out_path: JSON lines, see `data.read_answers`.
        config: settings.
        name: the target's name, stored with answers and in feature shards.
        quiet: no progress line.

    Returns:
        How many answers were added. Prompts longer than `max_prompt_tokens`, or than the context, are left out.

    Raises:
        ValueError: a folder that cannot be written (before the model runs), two prompts of one id, a full disk, or
            another run is writing to `out_path`.
    """
    for folder in (out_path.parent, *([config.features_dir] if config.features_dir else [])):
        write_probe(folder)
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise ValueError("two prompts have the same id: give each line its own, answers are resumed by id")
    ends, added = end_tokens(target), 0
    columns = (BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f} answers"), RateColumn())
    with ExitStack() as stack:
        file = stack.enter_context(out_path.open("ab", buffering=0))
        _lock(file, out_path)
        before = mend_answers(out_path)
        _refuse_foreign(before, name, out_path)
        done = {str(record.get("id")) for record in before}
        beat = Heartbeat(quiet)
        bar = stack.enter_context(Progress(*columns, TimeRemainingColumn(), disable=quiet))
        task = bar.add_task("", total=len(prompts), completed=len(done), counted=0)
        writer = None
        if config.features_dir is not None:
            identity = ShardIdentity.of(target, name, config.topk)
            writer = stack.enter_context(ShardWriter(config.features_dir, identity, config.max_gb))
        tokens = 0
        for answer in _Batch(target, config, ends).run(_waiting(target, tokenizer, prompts, config, done)):
            record = answer.record(tokenizer, ends, name)
            _append(file, record, out_path)
            if writer is not None:
                writer.add(answer.example(), record)
            added, tokens = added + 1, tokens + len(answer.tokens)
            bar.update(task, advance=1, counted=tokens)
            beat.line(f"{len(done) + added} of {len(prompts)} answers", tokens)
    return added


def _refuse_foreign(records: Sequence[dict[str, Any]], name: str, path: Path) -> None:
    others = sorted({str(record["model"]) for record in records if record.get("model", name) != name})
    if others:
        raise ValueError(f"{path} holds answers of {', '.join(others)}, not of {name}: give another --out")


def _lock(file: IO[bytes], path: Path) -> None:
    """Held until the file is closed, also by a kill. Two runs on one file would answer the same prompts twice."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another run is writing to {path}: wait for it, or give another --out") from error
    except OSError:  # a file system without locks
        return


def _waiting(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: RegenerateConfig,
    done: set[str],
) -> Iterator[_Answer]:
    context = target.context_length
    for index, prompt in enumerate(prompts):
        if prompt.id not in done:
            tokens = encode_prompt(tokenizer, prompt.turns[:1])
            room = config.max_new_tokens if context is None else min(config.max_new_tokens, context - len(tokens))
            if len(tokens) <= config.max_prompt_tokens and room > 0:
                yield _Answer(index, prompt, tokens, config.temperature(index), room)


def _append(file: IO[bytes], record: dict[str, Any], path: Path) -> None:
    try:
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error.strerror}): free space and run again, finished answers are kept"
        ) from error
