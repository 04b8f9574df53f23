"""Checks of streams: event framing, chunks, and the same content as the whole answer."""

from __future__ import annotations

from typing import Any

from haast.serving.conform.answers import whole_answer
from haast.serving.conform.base import Check, Theme, demand, fail, not_visible, short, silent
from haast.serving.conform.client import DONE, Streamed, parsed
from haast.serving.conform.subject import CHAT, PATTERN, STORY, TEXT, Subject, same_text

_LONG_ENOUGH = 0.05  # minimum seconds of a stream to judge when its pieces came


def recorded(subject: Subject) -> Streamed:
    """One stream that several checks use."""
    return subject.once("stream", lambda: subject.stream(STORY, max_tokens=24))


def frames(subject: Subject) -> str:
    """Events, comments and [DONE]."""
    streamed = recorded(subject)
    kind = streamed.headers.get("content-type", "")
    demand(kind.startswith("text/event-stream"), f"content-type is {short(kind)}")
    demand(not streamed.torn, "an event is not valid UTF-8: a character was cut in two")
    ends = [number for number, event in enumerate(streamed.data) if event.data.strip() == DONE]
    demand(ends == [len(streamed.data) - 1], f"{DONE} comes {len(ends)} times, or is not the last event")
    demand(not streamed.rest, f"after the last event comes {short(streamed.rest)}")
    broken = [event.data for event in streamed.data[:-1] if not isinstance(parsed(event.data), dict)]
    demand(not broken, f"an event is not a JSON object: {short(broken[:1])}")
    return f"{len(streamed.data) - 1} chunks and {DONE}"


def role_first(subject: Subject) -> str:
    """The role in the first delta."""
    deltas = [choice.get("delta") or {} for choice in _choices(recorded(subject))]
    demand(deltas[0].get("role") == "assistant", f"the first delta is {short(deltas[0])}, without the role")
    again = [delta for delta in deltas[1:] if delta.get("role") not in (None, "assistant")]
    demand(not again, f"a later delta has another role: {short(again[:1])}")
    return "first, together with text" if deltas[0].get("content") else "first, without text"


def finish_chunk(subject: Subject) -> str:
    """The chunk with the finish_reason."""
    choices = _choices(recorded(subject))
    ends = [number for number, choice in enumerate(choices) if choice.get("finish_reason")]
    demand(len(ends) == 1, f"{len(ends)} chunks have a finish_reason")
    demand(ends[0] == len(choices) - 1, "choices follow the one with the finish_reason")
    delta = choices[-1].get("delta") or {}
    demand(not delta.get("content"), f"the chunk with the finish_reason has content: {short(delta)}")
    return f"{choices[-1]['finish_reason']!r}, in a chunk of its own"


def usage_chunk(subject: Subject) -> str:
    """stream_options.include_usage."""
    streamed = subject.stream(STORY, max_tokens=8, stream_options={"include_usage": True})
    with_usage = [chunk for chunk in streamed.chunks if chunk.get("usage")]
    if not with_usage:
        silent("include_usage was accepted, but no chunk has usage")
    last = streamed.chunks[-1]
    demand(last.get("usage"), "the last chunk is not the one with usage")
    demand(last.get("choices") == [], f"the usage chunk's choices are {short(last.get('choices'))}, not empty")
    whole = subject.ask(STORY, max_tokens=8).usage
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        count, expected = last["usage"].get(name), whole.get(name)
        demand(count == expected, f"{name} is {short(count)} in the stream, {short(expected)} in the whole answer")
    return "last, without choices, and equal to that of the whole answer"


def chunk_ids(subject: Subject) -> str:
    """Fields that are equal in all chunks."""
    chunks = recorded(subject).chunks
    for name in ("id", "model", "created"):
        values = {str(chunk.get(name)) for chunk in chunks}
        demand(len(values) == 1 and values != {"None"}, f"{name} is {short(sorted(values)[:3])} in one stream")
    kinds = {chunk.get("object") for chunk in chunks}
    demand(kinds == {"chat.completion.chunk"}, f"object is {short(kinds)}")
    return "one id, model and created, object 'chat.completion.chunk'"


def stream_equals_whole(subject: Subject) -> str:
    """The same requests, whole and streamed."""
    requests: list[tuple[str, str, dict[str, Any]]] = [(CHAT, STORY, {}), (CHAT, "Say yes.", {})]
    if subject.offers_text():
        requests.append((TEXT, PATTERN, {}))
    if subject.seeded():
        requests.append((CHAT, STORY, {"temperature": 1, "seed": 11}))
    for path, prompt, fields in requests:
        whole = subject.ask(prompt, path, max_tokens=24, **fields)
        streamed = subject.streamed(prompt, path, max_tokens=24, **fields)
        same_text(whole.text, streamed.text, f"{path} of {short(prompt, 30)}")
        ends = (whole.finish, streamed.finish)
        demand(ends[0] == ends[1], f"{path} of {short(prompt, 30)}: finish_reason {ends[0]!r}, streamed {ends[1]!r}")
    return f"{len(requests)} requests, greedy{' and sampled' if len(requests) > 3 else ''}"


def stream_live(subject: Subject) -> str:
    """Arrival times of the pieces."""
    streamed = recorded(subject)
    times = [event.at for event in streamed.data if _content(parsed(event.data))]
    if len(times) < 2:
        demand(len(whole_answer(_whole_reply(subject)).text) < 20, f"the whole text came in {len(times)} piece")
        not_visible("the text is too short for several pieces")
    if times[-1] < _LONG_ENOUGH:
        not_visible(f"the stream took {times[-1]:.2f} s: too short to judge when its pieces came")
    share = times[0] / times[-1]
    demand(share < 0.8, f"the first piece came after {share:.0%} of the time: the server buffers the answer")
    return f"{len(times)} pieces, the first after {share:.0%} of the time"


def _whole_reply(subject: Subject) -> Any:
    return subject.client.post(CHAT, subject.body(STORY, max_tokens=24))


def _content(chunk: Any) -> str:
    choices = chunk.get("choices") if isinstance(chunk, dict) else None
    return ((choices[0].get("delta") or {}).get("content") or "") if choices else ""


def _choices(streamed: Streamed) -> list[dict[str, Any]]:
    """The first choice of every chunk that has one."""
    found = [chunk["choices"][0] for chunk in streamed.chunks if chunk.get("choices")]
    if not found:
        fail("no chunk has choices")
    return found


THEME = Theme(
    "streaming",
    (
        Check("sse-frames", (), "all events but comments are JSON, and [DONE] is the last", frames),
        Check("role-first", (), "the first delta has the role", role_first),
        Check("finish-chunk", (), "finish_reason comes once, last, in a chunk without text", finish_chunk),
        Check("usage-chunk", ("A5",), "include_usage adds a last chunk with usage and choices []", usage_chunk),
        Check("chunk-ids", (), "all chunks share id, model and created", chunk_ids),
        Check("stream-equals-whole", ("A10",), "a stream has the text of the whole answer", stream_equals_whole),
        Check("stream-live", (), "pieces come while the text is generated", stream_live),
    ),
)
