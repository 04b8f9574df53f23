"""Compares Haast with other inference engines on the same prompts and weights: greedy, interleaved prompt by prompt.

    python benchmarks/peers/weights.py --out peers-weights/
    python benchmarks/peers/run.py --weights peers-weights/ --prompts mt_bench.jsonl --json results/peers.json

Every peer runs in a separate process, and one works at a time. `--python NAME=PATH` sets the interpreter of a peer (by
the first word of its name), since not all of them can share an environment. A peer that does not load is listed as
absent, with the reason. Speeds are measured from the first new token on, without the prompt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from worker import PEERS

from haast.api import Haast
from haast.bench.report import machine
from haast.drafters.vanilla import VanillaDrafter
from haast.files import write_json
from haast.progress import Progress
from haast.prompts import read_prompts
from haast.target.load import load_target

_WARMUP = 16  # tokens
_COMPARED = ("haast vanilla f16", "haast vanilla gguf", "transformers fp32")  # texts are compared with theirs
_VERSIONS_OF = {  # packages whose versions are recorded
    "llama-cpp-python",
    "onnxruntime-genai",
    "openvino-genai",
    "transformers",
    "torch",
    "economize",
    "haast",
    "vllm",
}


class Peer:
    """The process of one peer."""

    def __init__(self, name: str, python: str, weights: Path, threads: int) -> None:
        script = str(Path(__file__).parent / "worker.py")
        command = [python, script, name, "--weights", str(weights), "--threads", str(threads)]
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        hello = self._read()
        self.error: str | None = hello.get("error")
        self.runs: list[list[dict[str, Any]]] = []

    def ask(self, ids: list[int], new: int) -> dict[str, Any]:
        """Get one answer; if the process dies, the peer is absent."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"ids": ids, "new": new}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.error = "its process ended"
            return {"tokens": [], "ms_first": 0.0, "ms_rest": 0.0, "peak_mb": 0.0}
        answer = self._read()
        self.error = self.error or answer.get("error")
        return answer

    def stop(self) -> None:
        """End the process by the end of its input, since it may have to stop a server; kill it after ten seconds."""
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "its process ended without an answer"}
        return answer


def main() -> None:
    """Run all peers that load, write the JSON and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", help="names, separated by commas; default: all")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    pythons = dict(pair.split("=", 1) for pair in arguments.python)
    names = list(PEERS) if arguments.peers is None else arguments.peers.split(",")
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        parser.error(f"unknown peers {unknown}: choose some of {sorted(PEERS)}")
    encoder = Haast(load_target(packing="off"), VanillaDrafter())
    prompts = [encoder.encode(p.turns[0]) for p in read_prompts(arguments.prompts, arguments.limit, spread=True)]
    ends = set(encoder.eos_ids())
    where = _environment(arguments, pythons)
    peers = [
        Peer(name, pythons.get(name.split()[0], sys.executable), arguments.weights, arguments.threads) for name in names
    ]
    for peer in peers:
        if peer.error is None:
            peer.ask(prompts[0], _WARMUP)
    with Progress("peers", "prompts", arguments.rounds * len(prompts)) as progress:
        for turn in range(arguments.rounds):
            for place, ids in enumerate(prompts):
                order = peers[(place + turn) % len(peers) :] + peers[: (place + turn) % len(peers)]
                for peer in order:
                    if peer.error is None:
                        if turn == 0:
                            peer.runs.append([])
                        peer.runs[place].append(peer.ask(ids, arguments.max_new_tokens))
                progress.step()
    rows = [_row(peer, peers, ends) for peer in peers]
    for peer in peers:
        peer.stop()
    document = {"kind": "peers", "peers": [peer.name for peer in peers], "rows": rows, "environment": where}
    write_json(document, str(arguments.json))
    _show(rows)


def _row(peer: Peer, peers: list[Peer], ends: set[int]) -> dict[str, Any]:
    if peer.error is not None or not peer.runs:
        return {"peer": peer.name, "absent": peer.error or "no answer"}
    tokens = [_before_end(runs[0]["tokens"], ends) for runs in peer.runs]
    rest_ms = sum(median(run["ms_rest"] for run in runs) for runs in peer.runs)
    row = {
        "peer": peer.name,
        "absent": None,
        "tokens_per_s": 1e3 * sum(len(t) - 1 for t in tokens) / rest_ms if rest_ms else None,
        "whole_ms": sum(median(run["ms_first"] + run["ms_rest"] for run in runs) for runs in peer.runs),
        "peak_mb": max(run["peak_mb"] for runs in peer.runs for run in runs),
    }
    for other in peers:
        if other.error is None and other.name in _COMPARED:
            theirs = [_before_end(runs[0]["tokens"], ends) for runs in other.runs]
            row[f"texts equal to {other.name}"] = sum(a == b for a, b in zip(tokens, theirs, strict=True))
    return row


def _before_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens before the end token, which only some peers return."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[:place]
    return tokens


def _environment(arguments: argparse.Namespace, pythons: dict[str, str]) -> dict[str, Any]:
    versions: dict[str, str] = {}
    for python in {sys.executable, *pythons.values()}:
        listed = subprocess.run(
            [python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True
        )
        for package in json.loads(listed.stdout):
            if package["name"].lower().replace("_", "-") in _VERSIONS_OF:
                versions[package["name"]] = package["version"]
    settings = {name: getattr(arguments, name) for name in ("limit", "max_new_tokens", "rounds", "threads")}
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]
    return machine() | {
        "command": " ".join(["python benchmarks/peers/run.py", *flags]),
        "prompts_file": arguments.prompts.name,
        "dtype": "as named",
        "packing": "as named",
        "settings": settings,
        "peer_versions": versions,
    }


def _show(rows: list[dict[str, Any]]) -> None:
    stock = next((row.get("tokens_per_s") for row in rows if row["peer"] == "transformers fp32"), None)
    for row in rows:
        if row["absent"]:
            print(f"{row['peer']:26s} absent: {row['absent']}")
            continue
        times = f"{row['tokens_per_s'] / stock:5.2f}x" if stock and row["tokens_per_s"] else ""
        equal = row.get("texts equal to transformers fp32")
        print(f"{row['peer']:26s} {row['tokens_per_s'] or 0:7.1f} tokens/s {times} stock  {equal} texts equal to fp32")


if __name__ == "__main__":
    main()
