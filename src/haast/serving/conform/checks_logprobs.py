"""Checks of logprobs: they belong to the generated tokens, are finite and sorted, and equal in a stream."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from haast.serving.conform.answers import entry_bytes
from haast.serving.conform.base import Check, Theme, demand, not_visible, short, silent
from haast.serving.conform.subject import COUNT, STORY, TEXT, Subject, same_text

_SLACK = 2e-3  # between two runs of the same request, and in sums
_TOP = 3


def chat_logprobs(subject: Subject) -> str:
    """Whole answers."""
    plain = subject.ask(STORY, max_tokens=12)
    answer = subject.ask(STORY, max_tokens=12, logprobs=True, top_logprobs=_TOP)
    entries = answer.first.entries
    if not entries:
        silent("logprobs=true was accepted, but there are none")
    same_text(plain.text, answer.text, "the text with logprobs")
    joined = b"".join(entry_bytes(entry) for entry in entries)
    demand(joined == answer.text.encode(), f"the tokens are {short(joined)}, the text is {short(answer.text)}")
    if answer.finish == "length":
        demand(len(entries) == answer.tokens, f"{len(entries)} entries for {answer.tokens} completion tokens")
    for entry in entries:
        _check_entry(entry)
    demand(any(entry["logprob"] < 0 for entry in entries), "every logprob is 0.0")
    return f"{len(entries)} entries, the chosen token first among {_TOP}"


def _check_entry(entry: dict[str, Any]) -> None:
    token, number = entry.get("token"), entry.get("logprob")
    demand(isinstance(number, int | float) and -1000 < number <= 0, f"the logprob of {short(token)} is {short(number)}")
    top = entry.get("top_logprobs") or []
    demand(1 <= len(top) <= _TOP, f"{len(top)} top_logprobs of {short(token)}, {_TOP} were requested")
    numbers = [each["logprob"] for each in top]
    demand(numbers == sorted(numbers, reverse=True), f"top_logprobs of {short(token)} are not in order: {numbers}")
    total = sum(2.718281828459045**each for each in numbers)
    demand(total <= 1 + _SLACK, f"top_logprobs of {short(token)} add up to a probability of {total:.3f}")
    # Equally likely tokens may come in any order: compare the logprob, then look for the token.
    best = abs(numbers[0] - float(number or 0)) <= _SLACK
    demand(best, f"the greedy token {short(token)} has {number}, the first of the top has {numbers[0]}")
    same = [each["logprob"] for each in top if entry_bytes(each) == entry_bytes(entry)]
    demand(same, f"the chosen token {short(token)} is not among its top_logprobs")
    demand(abs(same[0] - float(number or 0)) <= _SLACK, f"{short(token)} has {number}, among the top {same[0]}")


def stream_logprobs(subject: Subject) -> str:
    """Streams."""
    fields = {"max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    whole = subject.ask(COUNT, **fields).first.entries
    if not whole:
        not_visible("the whole answer has none either: see the check logprobs")
    entries = subject.streamed(COUNT, **fields).first.entries
    if not entries:
        silent("the whole answer has logprobs, the stream has none")
    demand(len(entries) == len(whole), f"{len(entries)} entries streamed, {len(whole)} whole")
    for left, right in zip(whole, entries, strict=True):
        demand(entry_bytes(left) == entry_bytes(right), f"token {short(right.get('token'))} is only in the stream")
        gap = abs(left["logprob"] - right["logprob"])
        demand(gap <= _SLACK, f"{short(left['token'])}: {left['logprob']} whole, {right['logprob']} streamed")
    return f"{len(entries)} entries, as in the whole answer"


def legacy_logprobs(subject: Subject) -> str:
    """Text completions."""
    subject.needs_text()
    answer = subject.ask("Once upon a time", TEXT, max_tokens=8, logprobs=2)
    logprobs = answer.first.legacy
    if not logprobs:
        silent("logprobs=2 was accepted, but there are none")
    tokens, numbers = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
    demand("".join(tokens) == answer.text, f"the tokens are {short(''.join(tokens))}, the text is {short(answer.text)}")
    demand(len(numbers) == len(tokens), f"{len(numbers)} token_logprobs of {len(tokens)} tokens")
    good = all(isinstance(each, int | float) and each <= 0 for each in numbers)
    demand(good and any(numbers), f"token_logprobs are {short(numbers)}")
    offsets = logprobs.get("text_offset") or []
    steps = [after - before for before, after in pairwise(offsets)]
    lengths = [len(token) for token in tokens[:-1]]
    demand(steps == lengths, f"text_offset increases by {short(steps)}, the tokens' lengths are {short(lengths)}")
    tops = logprobs.get("top_logprobs") or []
    demand(len(tops) == len(tokens), f"{len(tops)} top_logprobs of {len(tokens)} tokens")
    return f"{len(tokens)} tokens"


THEME = Theme(
    "logprobs",
    (
        Check(
            "logprobs",
            ("A6",),
            "logprobs belong to the generated tokens, and the greedy token is the likeliest",
            chat_logprobs,
        ),
        Check("logprobs-stream", ("A6",), "logprobs are the same in a stream", stream_logprobs),
        Check("logprobs-legacy", ("A6",), "text completions have logprobs with the right text_offset", legacy_logprobs),
    ),
)
