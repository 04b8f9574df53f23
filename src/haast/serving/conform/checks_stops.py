"""Checks of stop strings: the text ends before them, at any place in a block of accepted tokens."""

from __future__ import annotations

from haast.serving.conform.answers import Answer, entry_bytes, shown
from haast.serving.conform.base import Check, Theme, demand, not_visible, short, silent
from haast.serving.conform.subject import STORY, Subject, same_text

_MOST = 40  # tokens of the text, as in `Subject.story`
_STEP = 5  # characters from one stop to the next: about a token, so that every offset in a block is tested


def stops_of(text: str, count: int, shift: int = 0) -> list[str]:
    """Substrings of two to six characters, each about one token after the last; most span two tokens."""
    starts = [shift + number * _STEP for number in range(count)]
    return [text[start : start + 2 + number % 5] for number, start in enumerate(starts) if start < len(text) - 6]


def stop_whole(subject: Subject) -> str:
    """Whole answers."""
    text = subject.story().text
    stops = stops_of(text, 12)
    for stop in stops:
        _ends_before(text, stop, subject.ask(STORY, max_tokens=_MOST, stop=[stop]))
    return f"{len(stops)} stops, at every offset of a block"


def stop_stream(subject: Subject) -> str:
    """Streams."""
    text = subject.story().text
    stops = stops_of(text, 8, shift=2)
    for stop in stops:
        _ends_before(text, stop, subject.streamed(STORY, max_tokens=_MOST, stop=[stop]))
    return f"{len(stops)} stops, no part of one was sent"


def _ends_before(text: str, stop: str, answer: Answer) -> None:
    if answer.text == text:
        silent(f"stop={stop!r} did not end the text")
    same_text(text[: text.find(stop)], answer.text, f"stop={stop!r}")
    demand(answer.finish == "stop", f"stop={stop!r}: finish_reason is {short(answer.finish)}")


def stop_forms(subject: Subject) -> str:
    """One string, several, and one that does not occur."""
    text = subject.story().text
    later, sooner = text[24:29], text[9:13]
    _ends_before(text, later, subject.ask(STORY, max_tokens=_MOST, stop=later))
    several = ["\u2603 never", later, sooner, "\u2603\u2603"]
    first = min((stop for stop in (later, sooner)), key=text.find)
    _ends_before(text, first, subject.ask(STORY, max_tokens=_MOST, stop=several))
    same_text(text, subject.ask(STORY, max_tokens=_MOST, stop=["\u2603 never"]).text, "a stop that does not occur")
    # The prompt contains this stop: only the generated text may be searched.
    prompts = next(word for word in ("lighthouse", "short", "Tell", "fox") if word not in text or word == "fox")
    expected = text[: text.find(prompts)] if prompts in text else text
    same_text(expected, subject.ask(STORY, max_tokens=_MOST, stop=[prompts]).text, f"stop={prompts!r}, in the prompt")
    return "a string, a list, the first of several, and one that does not occur"


def stop_counts(subject: Subject) -> str:
    """Counts and logprobs of a stopped text."""
    plain = subject.story()
    whole = subject.permitted(lambda: subject.ask(STORY, max_tokens=_MOST, logprobs=True, top_logprobs=1))
    entries = None if whole is None else whole.first.entries
    for stop in stops_of(plain.text, 4, shift=13):
        answer = subject.ask(STORY, max_tokens=_MOST, stop=[stop])
        end = plain.text.find(stop) + len(stop)
        # The token that completes the stop must be generated, but none after it.
        most = plain.tokens - (2 * end < len(plain.text)) if entries is None else _tokens_until(entries, end)
        demand(answer.tokens <= most, f"stop={stop!r}: {answer.tokens} completion tokens, but {most} reach its end")
        if entries is not None:
            _no_more_entries(subject.ask(STORY, max_tokens=_MOST, stop=[stop], logprobs=True, top_logprobs=1), stop)
    if entries is None:
        not_visible("completion_tokens are plausible; without logprobs there is no more to compare")
    return "completion_tokens and logprobs end with the text"


def _tokens_until(entries: list[dict[str, object]], end: int) -> int:
    """Number of tokens whose text reaches `end`, in characters."""
    for count in range(1, len(entries) + 1):
        if len(shown(entries[:count])) >= end:
            return count
    return len(entries)


def _no_more_entries(answer: Answer, stop: str) -> None:
    entries = answer.first.entries or []
    length, start, beyond = len(answer.text.encode()), 0, list[str]()
    for entry in entries:
        if start >= length:
            beyond.append(str(entry.get("token")))
        start += len(entry_bytes(entry))
    words = f"{len(beyond)} of {len(entries)} logprob entries start after the text {short(answer.text[-16:])}"
    demand(not beyond, f"stop={stop!r}: {words}, from {short(''.join(beyond), 30)}")


THEME = Theme(
    "stops",
    (
        Check("stop-whole", ("A4",), "a stop string ends the text before it, with finish_reason 'stop'", stop_whole),
        Check("stop-stream", ("A4",), "a stop string ends a stream too, and no part of it is sent", stop_stream),
        Check("stop-forms", ("A4",), "stop may be a string or a list; the first match in the text counts", stop_forms),
        Check(
            "stop-counts",
            ("A4", "A5", "A6"),
            "no token after a stop is counted, and no logprob starts after the text",
            stop_counts,
        ),
    ),
)
