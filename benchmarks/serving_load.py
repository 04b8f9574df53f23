"""Load test of a server: throughput and latency by number of clients, with and without drafting, and of peers.

    haast serve --port 8000 &
    haast serve --port 8003 --drafter none &
    llama-server --model f16.gguf --threads 2 --parallel 32 --ctx-size 65536 --port 8001 &
    python benchmarks/serving_load.py --prompts mt_bench.jsonl --haast http://127.0.0.1:8000 \\
        --off http://127.0.0.1:8003 --peer "llama.cpp F16=http://127.0.0.1:8001" --json results/serving-load.json

Each client sends its next prompt when the last answer is complete: streamed, greedy, with mixed limits of new tokens.
For every number of clients each system runs for `--seconds`; requests that still run at the end are dropped, but their
tokens count. Measured per turn: tokens per second, time to the first token, and time between the tokens of an answer
(p50 and p99 over answers). "haast, drafting off" is a second process of the server: in the same one, whose turn comes
second would find the first one's prefixes computed. Its texts are compared with the drafted ones. The client is plain
asyncio, because it shares the cores with the server; run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from haast.bench.report import machine
from haast.files import write_json
from haast.prompts import read_prompts

LENGTHS = (16, 48, 96, 192)  # limits of new tokens, chosen at random


@dataclass(frozen=True)
class System:
    """A server."""

    name: str
    url: str


@dataclass
class Answer:
    """The outcome of one request."""

    question: int
    begin: float
    text: str = ""
    first: float = 0.0
    last: float = 0.0
    pieces: int = 0
    tokens: int = 0  # from the usage of the server
    whole: bool = False
    gaps: list[float] = field(default_factory=list)

    def take(self, text: str) -> None:
        now = time.perf_counter()
        if not self.pieces:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last, self.text, self.pieces = now, self.text + text, self.pieces + 1


async def ask(system: System, prompt: str, length: int, answer: Answer) -> None:
    """Request a streamed chat completion on a new connection."""
    where = urlsplit(system.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": length,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    try:
        await writer.drain()
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{system.name} answered {status!r}: {(await reader.read(2000))!r}")
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(f"{system.name}: {chunk['error']}")
            for choice in chunk.get("choices", ()):
                text = choice["delta"].get("content")
                if text:
                    answer.take(text)
            if chunk.get("usage"):
                answer.tokens, answer.whole = chunk["usage"]["completion_tokens"], True
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def turn(system: System, questions: Sequence[tuple[str, int]], clients: int, seconds: float) -> list[Answer]:
    """Run `clients` clients for `seconds`; returns every answer that was started."""
    answers, numbers = list[Answer](), itertools.count()

    async def client() -> None:
        while True:
            number = next(numbers) % len(questions)
            answer = Answer(number, time.perf_counter())
            answers.append(answer)
            await ask(system, *questions[number], answer)

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    done, pending = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()
    return answers


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """The results of one turn. Tokens of a dropped answer are estimated from its characters."""
    whole = [answer for answer in answers if answer.whole]
    rate = sum(each.tokens for each in whole) / max(sum(len(each.text) for each in whole), 1)
    tokens = sum(each.tokens if each.whole else rate * len(each.text) for each in answers)
    first = sorted(1e3 * (each.first - each.begin) for each in answers if each.pieces)
    between = sorted(
        1e3 * (each.last - each.first) / (each.tokens - 1) for each in whole if each.tokens > 8 and each.pieces > 1
    )
    stalls = sorted(1e3 * gap for each in answers for gap in each.gaps)
    return {
        "answers": len(whole),
        "tokens_per_s": tokens / seconds,
        **{f"ms_first_p{p}": _at(first, p) for p in (50, 99)},
        **{f"ms_between_p{p}": _at(between, p) for p in (50, 99)},
        "ms_gap_p99": _at(stalls, 99),
    }


def _at(values: Sequence[float], percent: int) -> float | None:
    return values[min(len(values) - 1, len(values) * percent // 100)] if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--haast", required=True, metavar="URL")
    parser.add_argument("--off", required=True, metavar="URL", help="the server with --drafter none")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--clients", default="1,2,4,8,16,32")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm", type=float, default=5, help="seconds of warm-up per system")
    parser.add_argument(
        "--note", action="append", default=[], help="note for the JSON, such as how a server was started"
    )
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    draw = random.Random(0)
    prompts = [prompt.turns[0] for prompt in read_prompts(arguments.prompts)]
    questions = [(prompt, draw.choice(LENGTHS)) for prompt in prompts]
    draw.shuffle(questions)
    systems = [
        System("haast", arguments.haast),
        System("haast, drafting off", arguments.off),
        *(System(*peer.split("=", 1)) for peer in arguments.peer),
    ]
    rows, texts, differ = list[dict[str, Any]](), dict[tuple[int, int], str](), 0
    for system in systems:
        asyncio.run(turn(system, questions, 2, arguments.warm))
    for clients in map(int, arguments.clients.split(",")):
        for system in systems:
            answers = asyncio.run(turn(system, questions, clients, arguments.seconds))
            row = {"clients": clients, "system": system.name, **summary(answers, arguments.seconds)}
            rows.append(row)
            sys.stderr.write(json.dumps(row) + "\n")
            for answer in answers:
                if answer.whole and system.url in (arguments.haast, arguments.off):
                    expected = texts.setdefault((0, answer.question), answer.text)
                    differ += expected != answer.text
            time.sleep(2)  # let dropped requests end
    flags = [f"--clients {arguments.clients}", f"--seconds {arguments.seconds:g}"]
    document = {
        "kind": "serving-load",
        "load": rows,
        "most_new_tokens": list(LENGTHS),
        "seconds": arguments.seconds,
        "differing_texts": differ,
        "compared_texts": len(texts),
        "notes": arguments.note,
        "environment": machine() | {"command": " ".join(["python benchmarks/serving_load.py", *flags])},
    }
    write_json(document, arguments.json)


if __name__ == "__main__":
    main()
