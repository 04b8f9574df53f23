"""Haast and its peers on the same prompts and weights, greedy, interleaved prompt by prompt: one JSON and one table.

    python benchmarks/peers/weights.py --out peers-weights/
    python benchmarks/peers/run.py --weights peers-weights/ --prompts mt_bench.jsonl --json results/peers.json

Every peer runs in a process of its own, one at a time. `--python NAME=PATH` gives a peer (by the first word of its
name) another interpreter, since not all of them live together in one environment. A peer that does not load is listed
as absent with the reason. Speeds count from the first new token on, so prompts are not in them.
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
_LISTED = {
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
    """A worker process."""

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
        """One answer; a worker that dies makes the peer absent."""
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
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"error": "its process ended without a word"}
        return found


def main() -> None:
    """Run all peers that are there."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--weights", type=Path, required=True)
    words.add_argument("--prompts", type=Path, required=True)
    words.add_argument("--limit", type=int, default=20)
    words.add_argument("--max-new-tokens", type=int, default=128)
    words.add_argument("--rounds", type=int, default=2)
    words.add_argument("--threads", type=int, default=2)
    words.add_argument("--peers", help="names, separated by commas; all if absent")
    words.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    words.add_argument("--json", type=Path, required=True)
    given = words.parse_args()
    pythons = dict(pair.split("=", 1) for pair in given.python)
    names = list(PEERS) if given.peers is None else given.peers.split(",")
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        words.error(f"unknown peers {unknown}: choose some of {sorted(PEERS)}")
    encoder = Haast(load_target(packing="off"), VanillaDrafter())
    prompts = [encoder.encode(p.turns[0]) for p in read_prompts(given.prompts, given.limit, spread=True)]
    ends = set(encoder.eos_ids())
    where = _environment(given, pythons)
    peers = [Peer(name, pythons.get(name.split()[0], sys.executable), given.weights, given.threads) for name in names]
    for peer in peers:
        if peer.error is None:
            peer.ask(prompts[0], _WARMUP)
    with Progress("peers", "prompts", given.rounds * len(prompts)) as progress:
        for turn in range(given.rounds):
            for place, ids in enumerate(prompts):
                order = peers[(place + turn) % len(peers) :] + peers[: (place + turn) % len(peers)]
                for peer in order:
                    if peer.error is None:
                        if turn == 0:
                            peer.runs.append([])
                        peer.runs[place].append(peer.ask(ids, given.max_new_tokens))
                progress.step()
    rows = [_row(peer, peers, ends) for peer in peers]
    for peer in peers:
        peer.stop()
    document = {"kind": "peers", "peers": [peer.name for peer in peers], "rows": rows, "environment": where}
    write_json(document, str(given.json))
    _show(rows)


def _row(peer: Peer, peers: list[Peer], ends: set[int]) -> dict[str, Any]:
    if peer.error is not None or not peer.runs:
        return {"peer": peer.name, "absent": peer.error or "it answered nothing"}
    tokens = [_cut(runs[0]["tokens"], ends) for runs in peer.runs]
    rest_ms = sum(median(run["ms_rest"] for run in runs) for runs in peer.runs)
    found = {
        "peer": peer.name,
        "absent": None,
        "tokens_per_s": 1e3 * sum(len(t) - 1 for t in tokens) / rest_ms if rest_ms else None,
        "whole_ms": sum(median(run["ms_first"] + run["ms_rest"] for run in runs) for runs in peer.runs),
        "peak_mb": max(run["peak_mb"] for runs in peer.runs for run in runs),
    }
    for other in peers:
        if other.error is None and other.name in ("haast vanilla", "transformers fp32"):
            theirs = [_cut(runs[0]["tokens"], ends) for runs in other.runs]
            found[f"texts equal to {other.name}"] = sum(a == b for a, b in zip(tokens, theirs, strict=True))
    return found


def _cut(tokens: list[int], ends: set[int]) -> list[int]:
    """Up to the end token, that one included: some peers keep it, some do not say it."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[:place]
    return tokens


def _environment(given: argparse.Namespace, pythons: dict[str, str]) -> dict[str, Any]:
    versions: dict[str, str] = {}
    for python in {sys.executable, *pythons.values()}:
        listed = subprocess.run(
            [python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True
        )
        for package in json.loads(listed.stdout):
            if package["name"].lower().replace("_", "-") in _LISTED:
                versions[package["name"]] = package["version"]
    settings = {name: getattr(given, name) for name in ("limit", "max_new_tokens", "rounds", "threads")}
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]
    return machine() | {
        "command": " ".join(["python benchmarks/peers/run.py", *flags]),
        "prompts_file": given.prompts.name,
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
