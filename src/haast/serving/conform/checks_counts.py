"""Checks of token counts: limits hold exactly, and usage counts the emitted tokens only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from haast.serving.conform.answers import Answer, streamed_answer
from haast.serving.conform.base import Check, Theme, demand, fail, not_visible, short, silent
from haast.serving.conform.subject import CHAT, COUNT, STORY, TEXT, Subject

_LIMITS = range(1, 13)
# Prompts with a short answer: min_tokens has an effect only if the text would have ended before.
_BRIEF = (
    "Answer with one word: what colour is grass?",
    "What is 2+2? Answer with the number only.",
    "Say yes.",
    "Which city is the capital of France? One word.",
)
_PARTS = ("reasoning_tokens", "accepted_prediction_tokens", "cached_tokens", "audio_tokens")


def max_tokens(subject: Subject) -> str:
    """Small values of max_tokens."""
    whole = subject.once("count", lambda: subject.ask(COUNT, max_tokens=24)).text
    reached = 0
    for most in _LIMITS:
        answer = subject.ask(COUNT, max_tokens=most)
        words = f"max_tokens={most}, finish_reason {short(answer.finish)}"
        demand(answer.tokens <= most, f"{words}: {answer.tokens} completion tokens")
        if answer.finish == "length":
            demand(answer.tokens == most, f"{words}: only {answer.tokens} completion tokens")
            reached += 1
        demand(whole.startswith(answer.text), f"{words}: {short(answer.text)} is not a prefix of the longer text")
    if not reached:
        not_visible(f"the model ends the text before every limit: {short(whole)}")
    return f"exact for {reached} limits from 1 to {_LIMITS[-1]}"


def max_completion_tokens(subject: Subject) -> str:
    """The newer name of max_tokens."""
    usual = subject.ask(COUNT, max_tokens=7)
    # As a stream that is closed early: if the limit is ignored, the text may be long.
    streamed = subject.stream(COUNT, CHAT, 40, max_tokens=None, max_completion_tokens=7)
    if len(streamed.events) >= 40 or streamed_answer(streamed).text != usual.text:
        silent(f"{short(streamed_answer(streamed).text, 40)} is not the text of max_tokens=7")
    return "the same text as with max_tokens"


def usage(subject: Subject) -> str:
    """Totals and details of usage."""
    brief, longer = subject.ask("Hi.", max_tokens=8), subject.ask(f"{STORY} {COUNT}", max_tokens=8)
    for answer in (brief, longer):
        _check_sums(answer.usage)
    demand(longer.prompt_tokens > brief.prompt_tokens, "a longer prompt has no more prompt tokens")
    plain = subject.text_path()
    if plain == TEXT:
        _check_sums(subject.ask(STORY, TEXT, max_tokens=8).usage)
    several = subject.client.post(CHAT, subject.body(COUNT, n=2, temperature=1, max_tokens=5))
    choices = several.body.get("choices") if several.status == 200 and isinstance(several.body, dict) else None
    if isinstance(choices, list) and len(choices) == 2:
        _check_sums(several.body.get("usage") or {})
        _counts_both(choices, several.body["usage"]["completion_tokens"])
    return f"{brief.prompt_tokens} + {brief.tokens} = {brief.usage['total_tokens']} tokens"


def _counts_both(choices: list[dict[str, Any]], counted: int) -> None:
    if all(choice.get("finish_reason") == "length" for choice in choices):
        demand(counted == 10, f"{counted} completion tokens for two choices of 5")


def _check_sums(usage: dict[str, Any]) -> None:
    numbers = [usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        fail(f"usage lacks a count: {short(usage)}")
    prompt, completion, total = (int(number or 0) for number in numbers)
    demand(prompt + completion == total, f"{prompt} prompt + {completion} completion tokens are not {total}")
    for name, number, whole in _parts(usage, prompt, completion):
        demand(0 <= number <= whole, f"{name} is {number}, more than the {whole} tokens that it is part of")


def _parts(usage: dict[str, Any], prompt: int, completion: int) -> Iterator[tuple[str, int, int]]:
    for group, whole in (("prompt_tokens_details", prompt), ("completion_tokens_details", completion)):
        for name, number in (usage.get(group) or {}).items():
            if name in _PARTS and isinstance(number, int):
                yield f"{group}.{name}", number, whole


def min_tokens(subject: Subject) -> str:
    """min_tokens."""
    for prompt in _BRIEF:
        brief = subject.ask(prompt, max_tokens=24)
        if brief.finish == "stop" and brief.text:
            return _check_minimum(subject, prompt, brief)
    return not_visible(f"no text ended within 24 tokens; the last was {short(brief.text)}")


def _check_minimum(subject: Subject, prompt: str, brief: Answer) -> str:
    least = brief.tokens + 4
    longer = subject.ask(prompt, max_tokens=least + 8, min_tokens=least)
    if longer.text == brief.text:
        silent(f"min_tokens={least} left the text at {brief.tokens} tokens")
    demand(longer.tokens >= least, f"min_tokens={least}: only {longer.tokens} completion tokens")
    exact = subject.ask(prompt, max_tokens=least, min_tokens=least)
    demand(exact.tokens == least, f"min_tokens=max_tokens={least}: {exact.tokens} completion tokens")
    # One token less than the text has: nothing may change, whether or not the end token is counted.
    free = subject.ask(prompt, max_tokens=24, min_tokens=brief.tokens - 1)
    demand(free.text == brief.text, f"min_tokens={brief.tokens - 1} changed a text of {brief.tokens} tokens")
    return f"{brief.tokens} tokens became {longer.tokens} with min_tokens={least}"


THEME = Theme(
    "counts",
    (
        Check("max-tokens", ("A5",), "finish_reason 'length' means exactly max_tokens tokens, for 1 to 12", max_tokens),
        Check("max-completion-tokens", (), "max_completion_tokens has the effect of max_tokens", max_completion_tokens),
        Check("usage", ("A5",), "usage adds up, and no detail exceeds its total", usage),
        Check("min-tokens", ("A8",), "min_tokens prevents an early end, and has no other effect", min_tokens),
    ),
)
