"""From answers or feature shards to training examples.

Owns which records are used and how: reading, the chat template, leaving out loops, extraction. Knows no head and no
trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from haast.errors import check_at_least
from haast.prompts import evenly, read_json_lines, read_prompts
from haast.stats import loops
from haast.target.target import Target
from haast.training.answers import read_answers, record_key
from haast.training.batches import Example
from haast.training.config import TrainingData
from haast.training.data import TokenSequence, encode_answers
from haast.training.diagnostics import check_features
from haast.training.features import extract, in_memory
from haast.training.held_out import split
from haast.training.shards import ShardIdentity, read_shards

_SHARE_OF_MEMORY = 0.5  # that features may take; training needs memory of its own
T = TypeVar("T")
Report = Callable[[str], None]  # is given one line for people


def warn_of_foreign_answers(records: Sequence[dict[str, Any]], model: str, report: Report) -> None:
    """Report answers of other models, and text that no model generated."""
    others = [str(record["model"]) for record in records if record.get("model", model) != model]
    given_text = sum(not record.get("response_ids") for record in records if "prompt" in record or "messages" in record)
    made_by = f"are from {', '.join(sorted(set(others)))}, not from {model}"
    for count, problem in ((len(others), made_by), (given_text, "are given text")):
        if count:
            report(
                f"warning: {count} of {len(records)} answers {problem}: a head learns best from its own target's "
                f"answers (`haast regenerate`)"
            )


def read_inputs(data: TrainingData, limit: int | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The answer records and the validation prompts. Raises ValueError if they can't be used."""
    records = _read_records(data, limit)
    if data.valid_prompts is not None:
        return records, [prompt.turns[0] for prompt in read_prompts(data.valid_prompts, data.valid_limit)]
    if data.answers is None:
        return records, split(_shard_records(data), data.valid_limit)[1]
    used, prompts = split(records, data.valid_limit)
    return list(compress(records, used)), prompts


def _read_records(data: TrainingData, limit: int | None) -> list[dict[str, Any]]:
    """The answer records, at most `limit`; none if only shards are given. Raises ValueError without data."""
    if limit is not None:
        check_at_least("limit", limit)
    if data.answers is not None:
        return read_answers(data.answers)[:limit]
    assert data.shards is not None, "TrainingData.check requires --answers or --shards"
    if not any(data.shards.glob("*.safetensors")):
        raise ValueError(f"{data.shards} has no feature shards (*.safetensors): give --answers to make them")
    return []


def _shard_records(data: TrainingData) -> list[dict[str, Any]]:
    """The answer records of all shards."""
    folder = data.shards or Path()
    files = [path.with_suffix(".jsonl") for path in sorted(folder.glob("*.safetensors"))]
    return [record for path in files for _, record in read_json_lines(path)]


def with_shards(
    target: Target,
    name: str,
    records: Sequence[dict[str, Any]],
    data: TrainingData,
    layers: tuple[int, ...],
    out: Path | None,
    report: Report,
) -> TrainingData:
    """`data` with shards in `out`/features if there are some already, or if the features would fill the memory."""
    if data.shards is not None or out is None:
        return data
    folder = out / "features"
    stored = any(folder.glob("*.safetensors"))
    if not stored and not any(out.glob("state-*.pt")):  # a run goes on as it began: the order of the data depends on it
        tokens = sum(len(sequence.tokens) for sequence in sequences_of(target, records, data))
        size, room = tokens * ShardIdentity.of(target, name, data.topk, layers).token_bytes, free_memory()
        stored = room is not None and size > _SHARE_OF_MEMORY * room
        if stored:
            report(f"features take {size / 1e9:.3g} GB, more than half of the free memory: they are stored in {folder}")
    return replace(data, shards=folder) if stored else data


def free_memory() -> int | None:
    """Bytes of memory that are free; None if the system does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def sequences_of(target: Target, records: Sequence[dict[str, Any]], data: TrainingData) -> list[TokenSequence]:
    """Token sequences with their supervised positions. Raises ValueError without a tokenizer or records."""
    if target.tokenizer is None:
        raise ValueError("the target has no tokenizer, so its chat template cannot be applied to answers")
    if not records:
        raise ValueError("--show-data needs answers: give --answers FILE")
    longest = min(data.max_tokens, target.context_length or data.max_tokens)
    return encode_answers(target.tokenizer, records, longest, target.vocab_size)


def drop_loops(items: list[T], answer: Callable[[T], Sequence[int]], data: TrainingData, report: Report) -> list[T]:
    """With --loops drop, the items whose answers do not loop; otherwise all."""
    if data.loops == "keep":
        return items
    kept = [item for item in items if not loops(answer(item))]
    report(f"{len(items) - len(kept)} of {len(items)} answers left out, since they loop")
    if not kept:
        raise ValueError("all answers loop, so there is nothing to train on: give --loops keep, or other answers")
    return kept


def examples_of(
    target: Target,
    name: str,
    records: Sequence[dict[str, Any]],
    data: TrainingData,
    limit: int | None,
    layers: tuple[int, ...],
    report: Report,
) -> tuple[list[Example], list[dict[str, Any]]]:
    """Examples and their answer records, extracted in memory or read from shards (missing ones are written first).

    Shards store looping answers too; --loops filters them in each run. With --answers only their examples are used.
    """
    identity = ShardIdentity.of(target, name, data.topk, layers)
    if data.shards is None:
        sequences = drop_loops(sequences_of(target, records, data), attrgetter("answer"), data, report)
        sequences = [s for s in sequences if len(s.tokens) >= 3]
        return in_memory(target, sequences, data.topk, layers), [sequence.record for sequence in sequences]
    if records:
        extract(target, sequences_of(target, records, data), data.shards, identity, max_gb=data.max_gb)
    examples, sources = read_shards(data.shards, identity)
    check_features(target, examples, str(data.shards))
    pairs = list(zip(examples, sources, strict=True))
    if records:
        keys = {record_key(record) for record in records}
        pairs = [pair for pair in pairs if record_key(pair[1]) in keys]
    elif limit is not None:  # evenly, since a shard is in order of length
        pairs = evenly(pairs, limit)
    if not records and data.valid_prompts is None:
        pairs = list(compress(pairs, split([record for _, record in pairs], data.valid_limit)[0]))
    pairs = drop_loops(pairs, lambda pair: pair[0].tokens[pair[0].supervised.bool()].tolist(), data, report)
    return [example for example, _ in pairs], [source for _, source in pairs]
