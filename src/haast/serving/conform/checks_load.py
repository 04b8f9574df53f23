"""Several at once, long prompts, warm caches, and clients that leave."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from haast.serving.conform.base import Check, Theme, demand, difference, fail, not_offered, not_visible
from haast.serving.conform.subject import CHAT, COUNT, PATTERN, STORY, TEXT, Subject, same_text
from haast.serving.conform.wire import WireError

_ROWS = (
    ("Name a colour.", 5), (STORY, 24), ("Say yes.", 12), (COUNT, 17), ("What is a prime number?", 8),
    ("List three rivers.", 20), ("Translate 'good night' into French.", 11), ("Why is the sky blue?", 14),
)  # fmt: skip
_LONG_TEXT = "The keeper of the lighthouse wrote down what he saw: ships, gulls, and once a fox on the ice. "
_LONG = 60  # such sentences; well past a thousand tokens
_ENDLESS = 1000  # tokens of a request whose client leaves
_RUNNING = re.compile(r"^\S*(?:requests_running|requests_processing)(?:\{[^}]*\})?\s+([0-9.e+]+)", re.M)
_DRAFTED = re.compile(r"^\S*(?:draft_tokens|drafted)(?:_total)?(?:\{[^}]*\})?\s+([0-9.e+]+)", re.M)
_ACCEPTED = re.compile(r"^\S*(?:accepted_tokens|draft_accepted|accepted)(?:_total)?(?:\{[^}]*\})?\s+([0-9.e+]+)", re.M)


def rows(subject: Subject) -> str:
    """Eight different requests at once."""
    alone = _alone(subject)
    together = subject.at_once([_asking(subject, prompt, most) for prompt, most in _ROWS])
    for number, (one, two) in enumerate(zip(alone, together, strict=True)):
        if one != two and two in alone:
            fail(f"request {number} got the text of request {alone.index(two)}")
        demand(one == two, f"request {number} among seven others: {difference(one, two)}", alone=one, together=two)
    return f"{len(_ROWS)} requests of different lengths at once, each as alone"


def row_streams(subject: Subject) -> str:
    """The same as streams: none ends because another begins."""
    alone = _alone(subject)
    asks = [lambda prompt=prompt, most=most: subject.streamed(prompt, max_tokens=most).text for prompt, most in _ROWS]
    for number, (one, two) in enumerate(zip(alone, subject.at_once(asks), strict=True)):
        demand(one == two, f"stream {number} among seven others: {difference(one, two)}", alone=one, together=two)
    return f"{len(_ROWS)} streams at once, each whole"


def _alone(subject: Subject) -> list[str]:
    return subject.once("rows", lambda: [_asking(subject, prompt, most)() for prompt, most in _ROWS])


def _asking(subject: Subject, prompt: str, most: int) -> Callable[[], str]:
    return lambda: subject.ask(prompt, max_tokens=most).text


def warm_prefix(subject: Subject) -> str:
    """What a cache of prefixes must not change."""
    nonce = f"{subject.client.wire.clock():.6f}"  # so that the first answer is computed from nothing
    prompt = f"Note {nonce}. {_LONG_TEXT * 4} What did the keeper see?"
    cold = subject.ask(prompt, max_tokens=20)
    for _ in range(2):
        warm = subject.ask(prompt, max_tokens=20)
        same_text(cold.text, warm.text, "the same prompt again")
    talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": cold.text}]
    talk.append({"role": "user", "content": "And what else?"})
    first, second = subject.ask(talk, max_tokens=12).text, subject.ask(talk, max_tokens=12).text
    same_text(first, second, "the conversation again")
    cached = (warm.usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return f"the same text cold and warm, {'no count of' if cached is None else cached} cached tokens"


def long_prompt(subject: Subject) -> str:
    """A prompt of more than a thousand tokens."""
    prompt = f"{_LONG_TEXT * _LONG} Sum this up in one sentence."
    whole = subject.ask(prompt, max_tokens=16)
    demand(whole.prompt_tokens > _LONG * 10, f"{whole.prompt_tokens} prompt tokens: the prompt was cut")
    same_text(whole.text, subject.streamed(prompt, max_tokens=16).text, "a long prompt's answer, streamed")
    return f"{whole.prompt_tokens} prompt tokens, streamed as in one piece"


def draft_counters(subject: Subject) -> str:
    """What the server tells of its drafting."""
    before = _counters(subject)
    if before is None:
        not_visible("/metrics counts no drafts: perhaps nothing is drafted")
    subject.ask(COUNT, max_tokens=24)
    drafted, accepted = _counters(subject) or before
    demand(accepted <= drafted, f"{accepted:.0f} tokens accepted of {drafted:.0f} drafted")
    if drafted >= 100:
        demand(accepted, f"none of {drafted:.0f} drafted tokens was accepted: the draft head is of no use")
    return f"{accepted:.0f} of {drafted:.0f} drafted tokens accepted"


def _counters(subject: Subject) -> tuple[float, float] | None:
    reply = subject.client.get("/metrics")
    if reply.status != 200:
        not_offered(f"/metrics gives HTTP {reply.status}")
    sums = [sum(float(each) for each in pattern.findall(reply.text)) for pattern in (_DRAFTED, _ACCEPTED)]
    return (sums[0], sums[1]) if _DRAFTED.search(reply.text) else None


def abort_stream(subject: Subject) -> str:
    """A client that leaves in the middle of a stream."""
    return _freed(subject, stream=True)


def abort_whole(subject: Subject) -> str:
    """A client that leaves before its answer."""
    return _freed(subject, stream=False)


def _freed(subject: Subject, stream: bool) -> str:
    """The server must be free soon after: by its own gauge, or else as a short request feels it."""
    idle = min(_short_request(subject, subject.client.timeout) for _ in range(3))
    patience = max(subject.patience, 6 * idle)
    with _left_alone(subject, stream, patience):
        busy = _short_request(subject, patience)
        gauge = _running(subject)
    if gauge:
        return _gauge_falls(subject, gauge)
    if busy < 1.5 * idle:
        not_visible(f"a short request takes {idle:.2f} s idle and {busy:.2f} s busy, and no gauge tells of requests")
    subject.client.wire.sleep(subject.patience / 6)
    limit = idle + max(0.4 * (busy - idle), 0.3 * idle)
    after = _short_request(subject, 4 * patience)
    words = f"a short request took {idle:.2f} s idle, {busy:.2f} s beside the long ones, {after:.2f} s after they left"
    demand(after <= limit, f"{words}: the server goes on for nobody")
    return words


def _gauge_falls(subject: Subject, busy: float) -> str:
    for _ in range(12):
        left = _running(subject)
        if not left:
            return f"the server's gauge fell from {busy:.0f} running to none"
        subject.client.wire.sleep(subject.patience / 12)
    return fail(f"{subject.patience:g} s after the clients left, the server's gauge still says {left:.0f} running")


def _running(subject: Subject) -> float:
    try:
        found = _RUNNING.findall(subject.client.get("/metrics", timeout=3).text)
    except WireError:
        return 0.0
    return sum(float(each) for each in found)


def _short_request(subject: Subject, timeout: float) -> float:
    """Seconds that a short request takes; the limit where it takes longer."""
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
def _left_alone(subject: Subject, stream: bool, patience: float) -> Iterator[None]:
    """Two long requests run inside the block; when it ends, their clients are gone."""
    leave = threading.Event()
    threads = []
    for _ in range(2):
        under_way = threading.Event()
        arguments = (subject, stream, patience, under_way, leave)
        threads.append(threading.Thread(target=_long_request, args=arguments, daemon=True))
        threads[-1].start()
        under_way.wait(patience if stream else subject.patience / 10)
    try:
        yield
    finally:
        leave.set()
        for thread in threads:
            thread.join(2 * patience + 1)


def _long_request(
    subject: Subject, stream: bool, patience: float, under_way: threading.Event, leave: threading.Event
) -> None:
    """Ask for a text without end, and leave: a stream when told to, a whole answer when patience is over."""
    path = subject.text_path()
    body = subject.body(PATTERN if path == TEXT else COUNT, path, max_tokens=_ENDLESS, stream=stream)
    request = subject.client.request("POST", path, body, timeout=patience)
    try:
        with subject.client.wire.open(request) as opened:
            for _ in opened.pieces:
                under_way.set()
                if stream:
                    leave.wait(4 * patience)
                    break
    except WireError:
        pass  # it was left, or never begun
    finally:
        under_way.set()


THEME = Theme(
    "load",
    (
        Check("batch-rows", ("A19", "A10"), "eight requests at once say what each says alone", rows),
        Check("batch-streams", ("A19",), "eight streams at once are whole", row_streams),
        Check("warm-prefix", ("A13",), "a prompt seen before gets the same answer", warm_prefix),
        Check(
            "long-prompt", ("A11", "A17"), "a prompt of a thousand tokens is answered, whole and streamed", long_prompt
        ),
        Check("draft-counters", ("A14", "A18"), "/metrics tells what drafting did", draft_counters),
        Check("abort-stream", (), "a stream that is left stops at once", abort_stream),
        Check("abort-whole", (), "a request that is left stops at once, streamed or not", abort_whole),
    ),
)
