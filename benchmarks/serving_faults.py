"""Fault injection for `haast serve`: clients that disconnect, broken bodies, floods, slow readers, signals.

    python benchmarks/serving_faults.py --json results/serving-faults.json

Starts servers in separate processes: a tiny model (tests/serve_tiny.py) for all tests, and the default model for leaks
after a thousand clients. Clients that stay connected compare their answers with those of an idle server. Memory is
measured at rest before and after, once caches and the KV pool have been filled. Loopback only; takes about fifteen
minutes on two cores.
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
WAYS = ("head", "body", "sent", "first", "later", "reset")  # when or how a client disconnects


@dataclass
class Reply:
    """A response, parsed as HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def data(self) -> Json:
        found: Json = json.loads(self.body)
        return found

    @property
    def well_formed(self) -> bool:
        """Whether it is a complete answer, or an error object without a Python traceback; a cut stream is not."""
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            return self.status == 200 and self.body.endswith(b"data: [DONE]\n\n")
        if self.status >= 400:
            return set(self.data["error"]) == {"message", "type", "param", "code"} and b"Traceback" not in self.body
        return self.status == 200


class CutError(Exception):
    """The connection ended before the answer was complete."""


def head_of(path: str, length: int, headers: dict[str, str] | None = None, method: str = "POST") -> bytes:
    """Request line and headers."""
    fields = {"host": HOST, "content-length": str(length), **(JSON if headers is None else headers)}
    return f"{method} {path} HTTP/1.1\r\n".encode() + b"".join(
        f"{name}: {value}\r\n".encode() for name, value in fields.items()
    ) + b"\r\n"  # fmt: skip


async def ask(
    port: int,
    path: str,
    body: Json | bytes | None = None,
    headers: dict[str, str] | None = None,
    raw: bytes | None = None,
) -> Reply:
    """Send one request on a new connection, or `raw` verbatim. Raises CutError, or an h11 error for invalid HTTP."""
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
    """Read a response; with a `pace`, wait that many seconds after each read of 512 bytes. Raises CutError."""
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
    """Close a connection and wait for it."""
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


def reset_at_close(writer: asyncio.StreamWriter) -> None:
    """Make `close` send RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def limited(works: Sequence[Callable[[], Awaitable[Any]]], most: int) -> list[Any]:
    """Run all `works`, at most `most` at a time."""
    slots = asyncio.Semaphore(most)

    async def one(work: Callable[[], Awaitable[Any]]) -> Any:
        async with slots:
            return await work()

    return list(await asyncio.gather(*(one(work) for work in works)))


def plain(reply: Reply) -> Any:
    """The texts of all choices of an answer, streamed or not."""
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return [choice.get("text", choice.get("message", {}).get("content")) for choice in reply.data["choices"]]
    texts: dict[int, str] = {}
    for line in reply.body.decode().splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:]).get("choices", ()):
                piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
                texts[choice["index"]] = texts.get(choice["index"], "") + piece
    return [texts[index] for index in sorted(texts)]


def numbered(number: int, tokens: int = 12, stream: bool = False) -> Json:
    """A request with a prompt and a seed that are unique to its number."""
    prompt = f"client {number} says {number * 7919 % 1000}"
    return {"prompt": prompt, "seed": number, "temperature": 1.0, "max_tokens": tokens, "stream": stream}


async def vanish(port: int, number: int, way: str, draw: random.Random) -> str:
    """A client that requests long answers and disconnects in one of `WAYS`."""
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
    """The result of `crowd`."""

    vanished: Counter[str] = field(default_factory=Counter)
    stayed: int = 0
    busy: int = 0
    wrong: list[int] = field(default_factory=list)  # clients whose text differs from that of an idle server
    quiet_s: float = 0.0  # seconds until the server was idle


async def crowd(port: int, count: int, seed: int = 0, stay: int = 5, at_once: int = 48) -> Crowd:
    """`count` clients that disconnect and, for every `stay` of them, one that stays and compares its answer."""
    draw, found = random.Random(seed), Crowd()
    stayers = range(count // stay)
    alone = [plain(await ask(port, TEXT, numbered(number))) for number in stayers]

    async def stayed(number: int) -> None:
        reply = await ask(port, TEXT, numbered(number, stream=number % 2 == 0))
        if reply.status == 429:
            found.busy += 1
        elif reply.status != 200 or not reply.well_formed or plain(reply) != alone[number]:
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
    """The server's gauges: running requests, waiting requests, and the share of the KV pool in use."""
    page = (await ask(port, "/metrics")).body.decode()
    matches = re.findall(
        r"^haast:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{.*\} (\S+)$", page, re.M
    )
    return {name: float(value) for name, value in matches}


async def quiet(port: int, seconds: float = 20.0) -> float:
    """Seconds until no request runs or waits. Raises TimeoutError."""
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        if not sum((await gauges(port)).values()):
            return time.monotonic() - begin
        await asyncio.sleep(0.05)
    raise TimeoutError(f"the server is still busy after {seconds} s: {await gauges(port)}")


@dataclass
class Fuzzed:
    """The result of `fuzz`."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # replies that should not occur
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
    """The defect of a reply, which may answer a body of any kind; None if it has none."""
    if reply.status >= 500 and reply.status != 503:
        return f"status {reply.status}"
    kind = reply.headers.get("content-type", "")
    html = kind.startswith("text/html") and reply.status == 200  # a rendered step
    if not kind.startswith(("application/json", "text/event-stream")) and not html:
        return f"content type {kind}"
    if reply.headers.get("x-content-type-options") != "nosniff":
        return "no nosniff header"
    try:
        return None if reply.well_formed else "neither an answer nor an error object"
    except (ValueError, KeyError, TypeError) as error:
        return f"not an error object: {error}"


async def fuzz(
    port: int, count: int, seed: int = 0, at_once: int = 8, work: Callable[[], tuple[float, float]] | None = None
) -> Fuzzed:
    """Send hostile requests and judge every reply; the answer to a valid request must not change.

    `work` returns the server's CPU seconds, see `Served.work`: delays that other programs cause, in the server or in
    this process, are not stalls of the server.
    """
    found, valid = Fuzzed(), numbered(1)
    work = work or (lambda: (time.monotonic(), 0.0))
    before, done, late = plain(await ask(port, TEXT, valid)), asyncio.Event(), 0.0

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
                found.wrong.append(f"/health returned {reply.status}")

    async def one(path: str, headers: dict[str, str], body: bytes) -> None:
        begin, what = time.monotonic(), f"{path} {body[:300]!r} ({len(body)} bytes)"
        try:
            reply = await ask(port, path, body, headers)
        except (CutError, h11.ProtocolError) as error:
            found.wrong.append(f"{error!r}: {what}")
            return
        took = time.monotonic() - begin
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
        if plain(await ask(port, TEXT, valid)) != before:
            found.wrong.append(f"the answer to a valid request changed within {start + len(part)} requests")
    done.set()
    await watching
    return found


async def floods(port: int) -> Counter[str]:
    """Request heads that are too long, never end, or contradict themselves; counts of the replies."""
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
        except CutError:  # the server does not read the rest of a flood, so its reply may be lost
            found[f"{name}: closed"] += 1
    return found


async def edges(port: int) -> dict[str, int]:
    """Statuses of requests close to the context length, which prompt and new tokens must not exceed."""
    context = int((await ask(port, "/v1/models")).data["data"][0]["max_model_len"])
    statuses = {}
    for length, tokens in ((context - 1, 1), (context - 1, 2), (context, 1), (context + 1, 1), (context - 5, 5)):
        body = {"prompt": [5] * length, "max_tokens": tokens, "ignore_eos": True}
        reply = await ask(port, TEXT, body)
        outcome = reply.data["usage"]["completion_tokens"] if reply.status == 200 else reply.data["error"]["code"]
        statuses[f"context{length - context:+d} and {tokens}: {outcome}"] = reply.status
    talk = {"messages": [{"role": "user", "content": "word " * 2 * context}]}
    statuses["chat"] = (await ask(port, CHAT, talk)).status
    return statuses


async def slow_readers(port: int, count: int, tokens: int = 300) -> Counter[str]:
    """Clients that do not read their stream for two seconds; another client, who has a place, must be answered."""

    async def slow(number: int) -> str:
        connection = await asyncio.get_running_loop().run_in_executor(None, narrow, port)
        reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
        try:
            body = json.dumps(numbered(number, tokens, stream=True) | {"haast": {"trace": True}}).encode()
            writer.write(head_of(TEXT, len(body)) + body)
            await asyncio.sleep(2)
            reply = await read_reply(reader, pace=0.001)
            return "whole" if reply.well_formed else "not told"
        except CutError:
            return "ended"
        finally:
            await shut(writer)

    slows = [asyncio.create_task(slow(number)) for number in range(count)]
    await asyncio.sleep(0.2)
    begin = time.monotonic()
    reply, seconds = await ask(port, TEXT, numbered(3)), time.monotonic() - begin
    found = Counter(await asyncio.gather(*slows))
    found[f"another was answered: {reply.status}"] += 1
    found["seconds of the other"] = round(seconds)
    return found


def narrow(port: int) -> socket.socket:
    """A connection with a small receive buffer."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(10)
    connection.connect((HOST, port))
    connection.setblocking(False)
    return connection


@dataclass
class Served:
    """The process of a server."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def rss(self) -> int:
        """Resident memory in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])

    def work(self) -> tuple[float, float]:
        """Seconds of a processor that all of its threads had, and those for which its event loop waited for one."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        waited = int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[1])
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), waited / 1e9

    def files(self) -> int:
        """Number of open files and sockets."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@contextmanager
def served(command: Sequence[str], log: Path, seconds: float = 120.0) -> Iterator[Served]:
    """Start a server and wait until it answers; kill it at the end if it still runs."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=out, env=settings, cwd=ROOT)
    try:
        until = time.monotonic() + seconds
        while time.monotonic() < until and process.poll() is None:
            listening = re.search(r"listening on http://127\.0\.0\.1:(\d+)", log.read_text())
            if listening is not None and asyncio.run(_ready(int(listening[1]))):
                yield Served(process, int(listening[1]), log)
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
    """The command of a server with a tiny model."""
    return [str(ROOT / "tests" / "serve_tiny.py"), json.dumps({"port": 0, **config})]


@dataclass
class Ended:
    """The outcomes of the requests that were open when a signal came."""

    whole: int = 0
    told: int = 0  # ended with an error object or an error event
    cut: int = 0
    late: Counter[str] = field(default_factory=Counter)  # replies to requests that came after the signal
    seconds: float = 0.0
    code: int | None = None


async def signalled(server: Served, sign: signal.Signals, count: int, grace: float) -> Ended:
    """Send a signal while `count` requests run and wait: short ones, and ones that need more time than `grace`."""
    found = Ended()

    async def one(number: int) -> None:
        body = numbered(number, 480 if number % 2 else 6, stream=number % 4 < 2) | {"ignore_eos": True}
        try:
            reply = await ask(server.port, TEXT, body)
        except (CutError, OSError):
            found.cut += 1
            return
        if not reply.well_formed:
            found.cut += 1
        elif reply.status != 200 or b'"error"' in reply.body:
            found.told += 1
        else:
            found.whole += 1

    works = [asyncio.create_task(one(number)) for number in range(count)]
    while sum((await gauges(server.port)).values()) == 0:
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.1)
    begin = time.monotonic()
    server.process.send_signal(sign)
    while server.process.poll() is None and time.monotonic() - begin < grace + 30:
        try:
            reply = await ask(server.port, TEXT, numbered(0))
            found.late[str(reply.status) if reply.well_formed else "cut"] += 1
        except (CutError, OSError):
            found.late["refused"] += 1
        await asyncio.sleep(0.2)
    found.seconds, found.code = round(time.monotonic() - begin, 1), server.process.poll()
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
    """Write every slot of the KV pool once, because unwritten memory is not resident yet."""
    context = int((await ask(port, "/v1/models")).data["data"][0]["max_model_len"])
    length = min(context - 8, tokens // 4)
    for number in range(tokens // length + 1):
        reply = await ask(port, TEXT, {"prompt": [5 + number] * length, "max_tokens": 1})
        assert reply.status == 200, reply.body


def leaks(server: Served, count: int, at_once: int, pool: int) -> Json:
    """Run `crowd` and measure memory before and after; a smaller crowd fills the caches before."""
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
    """The problems in a result of `leaks` or `fuzzed`."""
    found = [str(each) for each in result["wrong"][:5]]
    if result["rss_growth"] >= 0.02:
        found.append(f"memory has grown by {result['rss_growth']:.1%}")
    if result.get("stalled_s", 0) >= 0.3:
        found.append(f"nobody was answered for {result['stalled_s']:.2f} s")
    if result["after"]["pool_in_use"] != 0 or result["after"]["open_files"] > result["before"]["open_files"] + 2:
        found.append(f"the server still holds resources: {result['after']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000, help="clients that disconnect, per model")
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--json", type=Path, default=Path("results/serving-faults.json"))
    arguments = parser.parse_args()
    log, grace, pool = arguments.json.with_suffix(".log"), 3.0, 8192
    result: Json = {"kind": "serving-faults", "clients": arguments.clients, "bodies": arguments.bodies}
    with served(tiny_command(max_running=8, max_waiting=64, grace=grace, timeout=20), log) as server:
        result["fuzz"] = fuzzed(server, arguments.bodies, 20_000)
        result["vanish"] = leaks(server, arguments.clients, 48, 20_000)
        result["floods"] = dict(asyncio.run(floods(server.port)))
        result["edges"] = asyncio.run(edges(server.port))
        result["slow_readers"] = dict(asyncio.run(slow_readers(server.port, 7)))
        result["sigterm"] = vars(asyncio.run(signalled(server, signal.SIGTERM, 40, grace)))
    with served(tiny_command(max_running=8, max_waiting=64), log) as server:
        answer = plain(asyncio.run(ask(server.port, TEXT, numbered(5))))
        result["sigkill"] = vars(asyncio.run(signalled(server, signal.SIGKILL, 20, grace)))
        with served(tiny_command(port=server.port), log) as again:
            result["same_after_restart"] = plain(asyncio.run(ask(again.port, TEXT, numbered(5)))) == answer
    default = ["-m", "haast", "serve", "--port", "0", "--max-running", "16", "--kv-tokens", str(pool)]
    with served(default, log, 600) as server:
        result["vanish_default_model"] = leaks(server, arguments.clients, 16, pool)
    log.unlink()
    wrong = [problem for name in ("fuzz", "vanish", "vanish_default_model") for problem in problems(result[name])]
    wrong += ["SIGTERM cut an answer"] * (result["sigterm"]["cut"] > 0)
    wrong += ["an answer changed after SIGKILL"] * (not result["same_after_restart"])
    result["problems"] = wrong
    write_json({**result, **machine()}, str(arguments.json))
    print(json.dumps(result, indent=1))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
