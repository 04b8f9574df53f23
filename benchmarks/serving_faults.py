"""What goes wrong around a server, in full counts: clients that vanish, broken bodies, floods, slow readers, signals.

    python benchmarks/serving_faults.py --json results/serving-faults.json

Starts `haast serve` in processes of its own: a tiny model for all of it (tests/serve_tiny.py), and the default model
for what a thousand clients leave behind. Clients that stay compare their answers with those that they got alone. Memory
is measured at rest before and after, when caches and the KV pool have been filled once.
Loopback only; some fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import h11
from hostile import JSON, Json, hostile

from haast.bench.report import machine
from haast.files import write_json

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parents[1]
WAYS = ("head", "body", "sent", "first", "later", "reset")  # when a client vanishes


@dataclass
class Reply:
    """An answer as it came, checked to be HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def data(self) -> Json:
        found: Json = json.loads(self.body)
        return found

    @property
    def told(self) -> bool:
        """Whether it is an answer or an error that says so: never a cut stream, and never a trace of Python's."""
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            return self.status == 200 and self.body.endswith(b"data: [DONE]\n\n")
        if self.status >= 400:
            return set(self.data["error"]) == {"message", "type", "param", "code"} and b"Traceback" not in self.body
        return self.status == 200


class CutError(Exception):
    """The connection ended before its answer did."""


def head_of(path: str, length: int, headers: dict[str, str] | None = None, method: str = "POST") -> bytes:
    """The head of a request."""
    lines = {"host": HOST, "content-length": str(length), **(JSON if headers is None else headers)}
    return f"{method} {path} HTTP/1.1\r\n".encode() + b"".join(
        f"{name}: {value}\r\n".encode() for name, value in lines.items()
    ) + b"\r\n"  # fmt: skip


async def ask(
    port: int,
    path: str,
    body: Json | bytes | None = None,
    headers: dict[str, str] | None = None,
    raw: bytes | None = None,
) -> Reply:
    """One request on a connection of its own; `raw` is sent as it is. Raises CutError, or h11's for what is no HTTP."""
    sent = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    if raw is None:
        raw = head_of(path, len(sent), headers, "GET" if body is None else "POST") + sent
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(raw)
        return await read_reply(reader)
    finally:
        await shut(writer)


async def read_reply(reader: asyncio.StreamReader, pace: float = 0.0) -> Reply:
    """Read an answer, slowly where a pace is given. Raises CutError."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("host", HOST)]))
    parser.send(h11.EndOfMessage())
    status, headers, body = 0, dict[str, str](), b""
    while True:
        event = parser.next_event()
        if event is h11.NEED_DATA:
            try:
                data = await reader.read(512 if pace else 65536)
            except ConnectionError as error:
                raise CutError(f"after {len(body)} bytes: {error}") from error
            if not data and not status:
                raise CutError("before the answer")
            if not data and "content-length" not in headers:
                raise CutError(f"after {len(body)} bytes")
            parser.receive_data(data)
            await asyncio.sleep(pace)
        elif isinstance(event, h11.Response):
            status = event.status_code
            headers = {name.decode(): value.decode() for name, value in event.headers}
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return Reply(status, headers, body)


async def shut(writer: asyncio.StreamWriter) -> None:
    """Close a connection and wait until it is."""
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


def reset_at_close(writer: asyncio.StreamWriter) -> None:
    """Let closing send RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def limited(works: Sequence[Callable[[], Awaitable[Any]]], most: int) -> list[Any]:
    """Run them all, so many at once."""
    room = asyncio.Semaphore(most)

    async def one(work: Callable[[], Awaitable[Any]]) -> Any:
        async with room:
            return await work()

    return list(await asyncio.gather(*(one(work) for work in works)))


def plain(reply: Reply) -> Any:
    """What an answer says: its choices, whole or streamed."""
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return [choice.get("text", choice.get("message", {}).get("content")) for choice in reply.data["choices"]]
    texts: dict[int, str] = {}
    for line in reply.body.decode().splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
                texts[choice["index"]] = texts.get(choice["index"], "") + piece
    return [texts[index] for index in sorted(texts)]


def numbered(number: int, tokens: int = 12, stream: bool = False) -> Json:
    """A request like no other: its prompt and its seed are its number's."""
    words = f"client {number} says {number * 7919 % 1000}"
    return {"prompt": words, "seed": number, "temperature": 1.0, "max_tokens": tokens, "stream": stream}


async def vanish(port: int, number: int, way: str, draw: random.Random) -> str:
    """A client that asks for much and leaves, by half-sent requests, closed sockets, and resets."""
    body = json.dumps(numbered(number, 200, draw.random() < 0.5) | {"n": draw.choice([1, 1, 2])}).encode()
    head = head_of(TEXT, len(body))
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        if way == "head":
            writer.write(head[: draw.randrange(1, len(head))])
        elif way == "body":
            writer.write(head + body[: draw.randrange(len(body))])
        else:
            writer.write(head + body)
        await writer.drain()
        if way == "first":
            with suppress(TimeoutError, ConnectionError):
                await asyncio.wait_for(reader.read(1), 1)
        elif way in ("later", "reset"):
            await asyncio.sleep(draw.random() * 0.1)
        if way == "reset":
            reset_at_close(writer)
    finally:
        await shut(writer)
    return way


@dataclass
class Crowd:
    """What became of a crowd of which most vanished."""

    vanished: Counter[str] = field(default_factory=Counter)
    stayed: int = 0
    busy: int = 0
    wrong: list[int] = field(default_factory=list)  # who read another text than alone
    quiet_s: float = 0.0  # until nothing ran any more


async def crowd(port: int, count: int, seed: int = 0, stay: int = 5, at_once: int = 48) -> Crowd:
    """`count` clients that vanish and, for every `stay` of them, one that stays to the end and compares."""
    draw, found = random.Random(seed), Crowd()
    stayers = range(count // stay)
    alone = [plain(await ask(port, TEXT, numbered(number))) for number in stayers]

    async def stayed(number: int) -> None:
        reply = await ask(port, TEXT, numbered(number, stream=number % 2 == 0))
        if reply.status == 429:
            found.busy += 1
        elif reply.status != 200 or not reply.told or plain(reply) != alone[number]:
            found.wrong.append(number)
        else:
            found.stayed += 1

    async def left(number: int, way: str, own: random.Random) -> None:
        found.vanished[await vanish(port, number, way, own)] += 1

    works: list[Callable[[], Awaitable[None]]] = [lambda number=number: stayed(number) for number in stayers]  # type: ignore[misc]
    for number in range(count):
        way, own = WAYS[number % len(WAYS)], random.Random(draw.random())
        works.append(lambda number=number, way=way, own=own: left(number + 10_000, way, own))  # type: ignore[misc]
    draw.shuffle(works)
    await limited(works, at_once)
    found.quiet_s = await quiet(port)
    return found


async def gauges(port: int) -> dict[str, float]:
    """The server's numbers of requests that run and wait, and its use of the KV pool."""
    page = (await ask(port, "/metrics")).body.decode()
    found = re.findall(
        r"^haast:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{.*\} (\S+)$", page, re.M
    )
    return {name: float(value) for name, value in found}


async def quiet(port: int, seconds: float = 20.0) -> float:
    """Seconds until nothing runs and nothing waits. Raises TimeoutError."""
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        if not sum((await gauges(port)).values()):
            return time.monotonic() - begun
        await asyncio.sleep(0.05)
    raise TimeoutError(f"something still runs after {seconds} s: {await gauges(port)}")


@dataclass
class Fuzzed:
    """What a server said to bodies that no friend sends."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # of replies that should not be
    slowest_s: float = 0.0
    slowest: str = ""
    stalled_s: float = 0.0  # the longest that /health took meanwhile by the server's own doing, see `fuzz`
    machine_stalled_s: float = 0.0  # the longest that it was

    def add(self, other: Fuzzed) -> None:
        """Take in what was said to further ones."""
        self.statuses += other.statuses
        self.wrong += other.wrong
        self.slowest_s, self.slowest = max((self.slowest_s, self.slowest), (other.slowest_s, other.slowest))
        self.stalled_s = max(self.stalled_s, other.stalled_s)
        self.machine_stalled_s = max(self.machine_stalled_s, other.machine_stalled_s)


def judged(reply: Reply) -> str | None:
    """What is wrong with a reply to a body of whatever kind."""
    if reply.status >= 500 and reply.status != 503:
        return f"status {reply.status}"
    kind = reply.headers.get("content-type", "")
    html = kind.startswith("text/html") and reply.status == 200  # a step, drawn
    if not kind.startswith(("application/json", "text/event-stream")) and not html:
        return f"content type {kind}"
    if reply.headers.get("x-content-type-options") != "nosniff":
        return "no nosniff"
    try:
        return None if reply.told else "neither an answer nor an error object"
    except (ValueError, KeyError, TypeError) as error:
        return f"no error object: {error}"


async def fuzz(
    port: int, count: int, seed: int = 0, at_once: int = 8, work: Callable[[], tuple[float, float]] | None = None
) -> Fuzzed:
    """Send broken requests; every reply is judged, and a friend's answer has to stay what it was.

    `work` tells what the server has done, see `Served.work`: other programs run beside it, and neither what they hold
    it up nor what they hold up this process is the server's doing.
    """
    found, friend = Fuzzed(), numbered(1)
    work = work or (lambda: (time.monotonic(), 0.0))
    before, done, late = plain(await ask(port, TEXT, friend)), asyncio.Event(), 0.0

    async def tick() -> None:
        nonlocal late
        while not done.is_set():
            begun = time.monotonic()
            await asyncio.sleep(0.01)
            late += time.monotonic() - begun - 0.01
            found.machine_stalled_s = max(found.machine_stalled_s, time.monotonic() - begun - 0.01)

    async def watch() -> None:
        while not done.is_set():
            begun, own, (worked, waited) = time.monotonic(), late, work()
            reply = await ask(port, "/health")
            took, (worked_then, waited_then) = time.monotonic() - begun, work()
            await asyncio.sleep(0.02)  # a tick that was late meanwhile has counted it then
            stalled = min(took - (late - own) - (waited_then - waited), worked_then - worked)
            found.stalled_s = max(found.stalled_s, stalled)
            if reply.status != 200:
                found.wrong.append(f"/health says {reply.status}")

    async def one(path: str, headers: dict[str, str], body: bytes) -> None:
        begun, what = time.monotonic(), f"{path} {body[:300]!r} ({len(body)} bytes)"
        try:
            reply = await ask(port, path, body, headers)
        except (CutError, h11.ProtocolError) as error:
            found.wrong.append(f"{error!r}: {what}")
            return
        took = time.monotonic() - begun
        if took > found.slowest_s:
            found.slowest_s, found.slowest = took, what
        found.statuses[str(reply.status)] += 1
        wrong = judged(reply)
        if wrong is not None:
            found.wrong.append(f"{wrong}: {reply.body[:300]!r}: {what}")

    watching, requests = asyncio.gather(tick(), watch()), hostile(random.Random(seed))
    for start in range(0, count, 200):
        part = list(islice(requests, min(200, count - start)))
        await limited([lambda each=each: one(*each) for each in part], at_once)  # type: ignore[misc]
        if plain(await ask(port, TEXT, friend)) != before:
            found.wrong.append(f"a friend's answer changed within {start + len(part)} requests")
    done.set()
    await watching
    return found


async def floods(port: int) -> Counter[str]:
    """Heads that are too long, never end, or contradict themselves; what each was told."""
    many = b"".join(b"x-%d: %s\r\n" % (number, b"a" * 40) for number in range(4000))
    body, chunked = b'{"prompt":"a"}', b"transfer-encoding: chunked\r\n"
    first, kind = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n", b"content-type: application/json\r\n"
    lengths = b"content-length: 14\r\ncontent-length: 15\r\n"
    raws = {
        "many headers": first + many + b"\r\n",
        "a long header": first + b"x: " + b"a" * 100_000 + b"\r\n\r\n",
        "a long line": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
        "two lengths": first + kind + lengths + b"\r\n" + body,
        "length and chunks": first + kind + chunked + b"content-length: 14\r\n\r\n0\r\n\r\n" + body,
        "an unknown coding": first + kind + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "a wrong chunk": first + kind + chunked + b"\r\nzz\r\n" + body,
        "a length of letters": first + kind + b"content-length: ten\r\n\r\n" + body,
        "a folded header": first + b"x: a\r\n b\r\n" + b"content-length: 1_4\r\n\r\n" + body,
        "no http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n",
        "a body too long": first + kind + b"content-length: 99999999999\r\n\r\n" + body,
    }
    found = Counter[str]()
    for name, raw in raws.items():
        try:
            reply = await ask(port, "", raw=raw)
            wrong = judged(reply)
            found[f"{name}: {reply.status}" + ("" if wrong is None else f" {wrong}")] += 1
        except CutError:  # the rest of a flood is not read, so its reply may be lost with it
            found[f"{name}: closed"] += 1
    return found


async def edges(port: int) -> dict[str, int]:
    """Statuses of prompts around the context's edge, whose last new token has to fit."""
    context = int((await ask(port, "/v1/models")).data["data"][0]["max_model_len"])
    statuses = {}
    for length, tokens in ((context - 1, 1), (context - 1, 2), (context, 1), (context + 1, 1), (context - 5, 5)):
        body = {"prompt": [5] * length, "max_tokens": tokens, "ignore_eos": True}
        reply = await ask(port, TEXT, body)
        made = reply.data["usage"]["completion_tokens"] if reply.status == 200 else reply.data["error"]["code"]
        statuses[f"context{length - context:+d} and {tokens}: {made}"] = reply.status
    talk = {"messages": [{"role": "user", "content": "word " * 2 * context}]}
    statuses["chat"] = (await ask(port, CHAT, talk)).status
    return statuses


async def slow_readers(port: int, count: int, tokens: int = 300) -> Counter[str]:
    """Clients that read nothing of a stream for a while, and then what there is; others are answered meanwhile."""

    async def slow(number: int) -> str:
        made = await asyncio.get_running_loop().run_in_executor(None, narrow, port)
        reader, writer = await asyncio.open_connection(sock=made, limit=1024)
        try:
            body = json.dumps(numbered(number, tokens, stream=True) | {"haast": {"trace": True}}).encode()
            writer.write(head_of(TEXT, len(body)) + body)
            await asyncio.sleep(2)
            reply = await read_reply(reader, pace=0.001)
            return "whole" if reply.told else "not told"
        except CutError:
            return "ended"
        finally:
            await shut(writer)

    slows = [asyncio.create_task(slow(number)) for number in range(count)]
    await asyncio.sleep(0.2)
    begun = time.monotonic()
    reply = await ask(port, TEXT, numbered(3))
    found = Counter(await asyncio.gather(*slows))
    found[f"another was answered: {reply.status}"] += 1
    found["seconds of the other"] = round(time.monotonic() - begun)
    return found


def narrow(port: int) -> socket.socket:
    """A connection that takes little at a time."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    made.settimeout(10)
    made.connect((HOST, port))
    made.setblocking(False)
    return made


@dataclass
class Served:
    """A server's process."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def rss(self) -> int:
        """Bytes of memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])

    def work(self) -> tuple[float, float]:
        """Seconds of a processor that all of its threads had, and those for which its event loop waited for one."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        waited = int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[1])
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), waited / 1e9

    def files(self) -> int:
        """Open files and sockets."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@contextmanager
def served(command: Sequence[str], log: Path, seconds: float = 120.0) -> Iterator[Served]:
    """A server in a process of its own, once it answers; killed at the end where it still runs."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=out, env=settings, cwd=ROOT)
    try:
        until = time.monotonic() + seconds
        while time.monotonic() < until and process.poll() is None:
            told = re.search(r"listening on http://127\.0\.0\.1:(\d+)", log.read_text())
            if told is not None and asyncio.run(_ready(int(told[1]))):
                yield Served(process, int(told[1]), log)
                return
            time.sleep(0.1)
        raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
    finally:
        process.kill()
        process.wait()


async def _ready(port: int) -> bool:
    try:
        return (await ask(port, "/health")).status == 200
    except (OSError, CutError):
        return False


def tiny_command(**config: Any) -> list[str]:
    """What starts a server on a tiny model."""
    return [str(ROOT / "tests" / "serve_tiny.py"), json.dumps({"port": 0, **config})]


@dataclass
class Ended:
    """What became of the requests that were open when a signal came."""

    whole: int = 0
    told: int = 0  # by an error object, or an error event
    cut: int = 0
    late: Counter[str] = field(default_factory=Counter)  # what requests were told that came after the signal
    seconds: float = 0.0
    code: int | None = None


async def signalled(server: Served, sign: signal.Signals, count: int, grace: float) -> Ended:
    """Send a signal while `count` requests run and wait, short ones and longer ones than the grace allows."""
    found = Ended()

    async def one(number: int) -> None:
        body = numbered(number, 480 if number % 2 else 6, stream=number % 4 < 2) | {"ignore_eos": True}
        try:
            reply = await ask(server.port, TEXT, body)
        except (CutError, OSError):
            found.cut += 1
            return
        if not reply.told:
            found.cut += 1
        elif reply.status != 200 or b'"error"' in reply.body:
            found.told += 1
        else:
            found.whole += 1

    works = [asyncio.create_task(one(number)) for number in range(count)]
    while sum((await gauges(server.port)).values()) == 0:
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.1)
    begun = time.monotonic()
    server.process.send_signal(sign)
    while server.process.poll() is None and time.monotonic() - begun < grace + 30:
        try:
            reply = await ask(server.port, TEXT, numbered(0))
            found.late[str(reply.status) if reply.told else "cut"] += 1
        except (CutError, OSError):
            found.late["refused"] += 1
        await asyncio.sleep(0.2)
    found.seconds, found.code = round(time.monotonic() - begun, 1), server.process.poll()
    await asyncio.gather(*works)
    return found


def memory(server: Served) -> Json:
    """At rest, when the server has tidied up: the least of some seconds, since a busy machine lets it do so late."""
    asyncio.run(quiet(server.port, 60))
    looks = []
    for _ in range(8):
        time.sleep(1)
        looks.append((server.rss(), server.files()))
    pool = asyncio.run(gauges(server.port))["kv_cache_usage_perc"]
    rss, files = (min(each) for each in zip(*looks, strict=True))
    return {"rss_mb": round(rss / 2**20, 1), "pool_in_use": pool, "open_files": files}


async def fill(port: int, tokens: int) -> None:
    """Use every place of the KV pool once: memory that nobody has written to is not there yet."""
    context = int((await ask(port, "/v1/models")).data["data"][0]["max_model_len"])
    length = min(context - 8, tokens // 4)
    for number in range(tokens // length + 1):
        reply = await ask(port, TEXT, {"prompt": [5 + number] * length, "max_tokens": 1})
        assert reply.status == 200, reply.body


def leaks(server: Served, count: int, at_once: int, pool: int) -> Json:
    """Memory before and after a crowd; one a third as large has filled the caches before."""
    asyncio.run(fill(server.port, pool))
    asyncio.run(crowd(server.port, count // 3, seed=1, at_once=at_once))
    before = memory(server)
    found = asyncio.run(crowd(server.port, count, at_once=at_once))
    after = memory(server)
    growth = after["rss_mb"] / before["rss_mb"] - 1
    result = vars(found) | {"vanished": dict(found.vanished), "before": before, "after": after, "rss_growth": growth}
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def fuzzed(server: Served, count: int, pool: int) -> Json:
    """Memory after a fifth of the broken bodies, which has filled the caches, and after all of them.

    Each fifth is made of the same kinds by another seed, so what a kind of body leaves behind would show four times.
    """
    asyncio.run(fill(server.port, pool))
    found, rests = Fuzzed(), list[Json]()
    for part in range(5):
        found.add(asyncio.run(fuzz(server.port, count // 5, seed=part, work=server.work)))
        rests.append(memory(server))
        print(part, rests[-1], found.stalled_s, file=sys.stderr, flush=True)
    result = vars(found) | {"statuses": dict(found.statuses), "count": count, "before": rests[0], "after": rests[-1]}
    result["rss_mb"] = {str(count // 5 * (part + 1)): rest["rss_mb"] for part, rest in enumerate(rests)}
    result["rss_growth"] = rests[-1]["rss_mb"] / rests[0]["rss_mb"] - 1
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def problems(result: Json) -> list[str]:
    """What should not be in a result of `leaks` or `fuzzed`."""
    found = [str(each) for each in result["wrong"][:5]]
    if result["rss_growth"] >= 0.02:
        found.append(f"memory has grown by {result['rss_growth']:.1%}")
    if result.get("stalled_s", 0) >= 0.3:
        found.append(f"nobody was answered for {result['stalled_s']:.2f} s")
    if result["after"]["pool_in_use"] != 0 or result["after"]["open_files"] > result["before"]["open_files"] + 2:
        found.append(f"something is held: {result['after']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000, help="that vanish, of each model")
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--json", type=Path, default=Path("results/serving-faults.json"))
    given = parser.parse_args()
    log, grace, pool = given.json.with_suffix(".log"), 3.0, 8192
    result: Json = {"kind": "serving-faults", "clients": given.clients, "bodies": given.bodies}
    with served(tiny_command(max_running=8, max_waiting=64, grace=grace, timeout=20), log) as server:
        result["fuzz"] = fuzzed(server, given.bodies, 20_000)
        result["vanish"] = leaks(server, given.clients, 48, 20_000)
        result["floods"] = dict(asyncio.run(floods(server.port)))
        result["edges"] = asyncio.run(edges(server.port))
        result["slow_readers"] = dict(asyncio.run(slow_readers(server.port, 8)))
        result["sigterm"] = vars(asyncio.run(signalled(server, signal.SIGTERM, 40, grace)))
    with served(tiny_command(max_running=8, max_waiting=64), log) as server:
        said = plain(asyncio.run(ask(server.port, TEXT, numbered(5))))
        result["sigkill"] = vars(asyncio.run(signalled(server, signal.SIGKILL, 20, grace)))
        with served(tiny_command(port=server.port), log) as again:
            result["same_after_restart"] = plain(asyncio.run(ask(again.port, TEXT, numbered(5)))) == said
    default = ["-m", "haast", "serve", "--port", "0", "--max-running", "16", "--kv-tokens", str(pool)]
    with served(default, log, 600) as server:
        result["vanish_default_model"] = leaks(server, given.clients, 16, pool)
    log.unlink()
    wrong = [word for name in ("fuzz", "vanish", "vanish_default_model") for word in problems(result[name])]
    wrong += ["SIGTERM has cut an answer"] * (result["sigterm"]["cut"] > 0)
    wrong += ["after SIGKILL an answer is another"] * (not result["same_after_restart"])
    result["problems"] = wrong
    write_json({**result, **machine()}, str(given.json))
    print(json.dumps(result, indent=1))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
