"""Checks under load: concurrent requests, long prompts, warm caches, and clients that disconnect."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from haast.serving.conform.base import Check, Theme, demand, difference, fail, not_offered, not_visible
from haast.serving.conform.subject import CHAT, COUNT, PATTERN, STORY, TEXT, Subject, same_text
from haast.serving.conform.wire import WireError

_REQUESTS = (
    ("Name a colour.", 5), (STORY, 24), ("Say yes.", 12), (COUNT, 17), ("What is a prime number?", 8),
    ("List three rivers.", 20), ("Translate 'good night' into French.", 11), ("Why is the sky blue?", 14),
)  # fmt: skip
_LONG_TEXT = "The keeper of the lighthouse wrote down what he saw: ships, gulls, and once a fox on the ice. "
_LONG = 60  # sentences; well above a thousand tokens
_ENDLESS = 1000  # tokens of a request whose client disconnects
_RUNNING = re.compile(r"^\S*(?:requests_running|requests_processing)(?:\{[^}]*\})?\s+([0-9.e+]+)", re.M)
_DRAFTED = re.compile(r"^\S*(?:draft_tokens|drafted)(?:_total)?(?:\{[^}]*\})?\s+([0-9.e+]+)", re.M)
_ACCEPTED = re.compile(r"^\S*(?:accepted_tokens|draft_accepted|accepted)(?:_total)?(?:\{[^}]*\})?\s+([0-9.e+]+)", re.M)


def rows(subject: Subject) -> str:
    """Eight different whole answers at once."""
    alone = _alone(subject)
    together = subject.at_once([_request_of(subject, prompt, most) for prompt, most in _REQUESTS])
    for number, (one, two) in enumerate(zip(alone, together, strict=True)):
        if one != two and two in alone:
            fail(f"request {number} got the text of request {alone.index(two)}")
        demand(one == two, f"request {number} among seven others: {difference(one, two)}", alone=one, together=two)
    return f"{len(_REQUESTS)} requests of different lengths at once, each has the text that it has alone"


def row_streams(subject: Subject) -> str:
    """Eight streams at once: none ends because another starts."""
    alone = _alone(subject)
    asks = [
        lambda prompt=prompt, most=most: subject.streamed(prompt, max_tokens=most).text for prompt, most in _REQUESTS
    ]
    for number, (one, two) in enumerate(zip(alone, subject.at_once(asks), strict=True)):
        demand(one == two, f"stream {number} among seven others: {difference(one, two)}", alone=one, together=two)
    return f"{len(_REQUESTS)} streams at once, each complete"


def _alone(subject: Subject) -> list[str]:
    return subject.once("rows", lambda: [_request_of(subject, prompt, most)() for prompt, most in _REQUESTS])


def _request_of(subject: Subject, prompt: str, most: int) -> Callable[[], str]:
    return lambda: subject.ask(prompt, max_tokens=most).text


def warm_prefix(subject: Subject) -> str:
    """The same prompt with an empty and a warm prefix cache."""
    nonce = f"{subject.client.wire.clock():.6f}"  # a new prompt, so the first answer can't use the cache
    prompt = f"Note {nonce}. {_LONG_TEXT * 4} What did the keeper see?"
    cold = subject.ask(prompt, max_tokens=20)
    for _ in range(2):
        warm = subject.ask(prompt, max_tokens=20)
        same_text(cold.text, warm.text, "the same prompt again")
    conversation = [{"role": "user", "content": prompt}, {"role": "assistant", "content": cold.text}]
    conversation.append({"role": "user", "content": "And what else?"})
    first, second = (subject.ask(conversation, max_tokens=12).text for _ in range(2))
    same_text(first, second, "the conversation again")
    cached = (warm.usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return f"the same text cold and warm, {'unknown' if cached is None else cached} cached tokens"


def long_prompt(subject: Subject) -> str:
    """A prompt of more than a thousand tokens."""
    prompt = f"{_LONG_TEXT * _LONG} Sum this up in one sentence."
    whole = subject.ask(prompt, max_tokens=16)
    demand(whole.prompt_tokens > _LONG * 10, f"{whole.prompt_tokens} prompt tokens: the prompt was cut")
    same_text(whole.text, subject.streamed(prompt, max_tokens=16).text, "a long prompt's answer, streamed")
    return f"{whole.prompt_tokens} prompt tokens, the same streamed and whole"


def draft_counters(subject: Subject) -> str:
    """Drafting counters in /metrics."""
    before = _counters(subject)
    if before is None:
        not_visible("/metrics has no drafting counters: the server may not draft")
    subject.ask(COUNT, max_tokens=24)
    drafted, accepted = _counters(subject) or before
    demand(accepted <= drafted, f"{accepted:.0f} tokens accepted of {drafted:.0f} drafted")
    if drafted >= 100:
        demand(accepted, f"none of {drafted:.0f} drafted tokens was accepted: the drafter has no effect")
    return f"{accepted:.0f} of {drafted:.0f} drafted tokens accepted"


def _counters(subject: Subject) -> tuple[float, float] | None:
    reply = subject.client.get("/metrics")
    if reply.status != 200:
        not_offered(f"/metrics gives HTTP {reply.status}")
    sums = [sum(float(each) for each in pattern.findall(reply.text)) for pattern in (_DRAFTED, _ACCEPTED)]
    return (sums[0], sums[1]) if _DRAFTED.search(reply.text) else None


def abort_stream(subject: Subject) -> str:
    """A client that disconnects in the middle of a stream."""
    return _check_idle_after(subject, stream=True)


def abort_whole(subject: Subject) -> str:
    """A client that disconnects before its whole answer is ready."""
    return _check_idle_after(subject, stream=False)


def _check_idle_after(subject: Subject, stream: bool) -> str:
    """The server must be idle soon after: by its own gauge, or else by the time of a short request."""
    idle = min(_short_request(subject, subject.client.timeout) for _ in range(3))
    patience = max(subject.patience, 6 * idle)
    with _abandoned_requests(subject, stream, patience):
        busy = _short_request(subject, patience)
        gauge = _running(subject)
    if gauge:
        return _gauge_falls(subject, gauge)
    if busy < 1.5 * idle:
        not_visible(f"a short request takes {idle:.2f} s idle and {busy:.2f} s busy, and there is no gauge of requests")
    subject.client.wire.sleep(subject.patience / 6)
    limit = idle + max(0.4 * (busy - idle), 0.3 * idle)
    after = _short_request(subject, 4 * patience)
    words = f"a short request took {idle:.2f} s idle, {busy:.2f} s under load, {after:.2f} s after the clients left"
    demand(after <= limit, f"{words}: the server still computes the cancelled requests")
    return words


def _gauge_falls(subject: Subject, busy: float) -> str:
    for _ in range(12):
        left = _running(subject)
        if not left:
            return f"the server's gauge fell from {busy:.0f} running to none"
        subject.client.wire.sleep(subject.patience / 12)
    return fail(f"{subject.patience:g} s after the clients left, the server's gauge still shows {left:.0f} running")


def _running(subject: Subject) -> float:
    try:
        found = _RUNNING.findall(subject.client.get("/metrics", timeout=3).text)
    except WireError:
        return 0.0
    return sum(float(each) for each in found)


def _short_request(subject: Subject, timeout: float) -> float:
    """Seconds that a short request takes, at most `timeout`."""
    wire = subject.client.wire
    began = wire.clock()
    try:
        subject.client.post(CHAT, subject.body("Hi.", max_tokens=8), timeout)
    except WireError as error:
        if not error.late:
            raise
        return timeout
    return wire.clock() - began


@contextmanager
def _abandoned_requests(subject: Subject, stream: bool, patience: float) -> Iterator[None]:
    """Run two long requests inside the block; their clients disconnect at its end."""
    leave = threading.Event()
    threads = []
    for _ in range(2):
        started = threading.Event()
        arguments = (subject, stream, patience, started, leave)
        threads.append(threading.Thread(target=_long_request, args=arguments, daemon=True))
        threads[-1].start()
        started.wait(patience if stream else subject.patience / 10)
    try:
        yield
    finally:
        leave.set()
        for thread in threads:
            thread.join(2 * patience + 1)


def _long_request(
    subject: Subject, stream: bool, patience: float, started: threading.Event, leave: threading.Event
) -> None:
    """Request a very long text and disconnect: from a stream when `leave` is set, else after `patience` seconds."""
    path = subject.text_path()
    body = subject.body(PATTERN if path == TEXT else COUNT, path, max_tokens=_ENDLESS, stream=stream)
    request = subject.client.request("POST", path, body, timeout=patience)
    try:
        with subject.client.wire.open(request) as opened:
            for _ in opened.pieces:
                started.set()
                if stream:
                    leave.wait(4 * patience)
                    break
    except WireError:
        pass  # the client disconnected, or got no answer
    finally:
        started.set()


THEME = Theme(
    "load",
    (
        Check("batch-rows", ("A19", "A10"), "eight requests at once have the texts that they have alone", rows),
        Check("batch-streams", ("A19",), "eight streams at once are complete", row_streams),
        Check("warm-prefix", ("A13",), "a repeated prompt gets the same answer", warm_prefix),
        Check(
            "long-prompt", ("A11", "A17"), "a prompt of a thousand tokens is answered, whole and streamed", long_prompt
        ),
        Check("draft-counters", ("A14", "A18"), "/metrics counts drafted and accepted tokens", draft_counters),
        Check("abort-stream", (), "a stream stops at once when its client disconnects", abort_stream),
        Check("abort-whole", (), "a whole answer stops at once when its client disconnects", abort_whole),
    ),
)
