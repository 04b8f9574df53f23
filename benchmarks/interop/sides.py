"""Shared code of the interop checks: runs a script in another program's environment, and describes the result.

The other programs need other versions of torch and transformers than Haast. Each has its own virtual environment and a
script `*_side.py` that does not import Haast: it reads a request as JSON and writes an answer as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from haast.api import Haast
from haast.bench.report import machine
from haast.errors import HeadMismatchError
from haast.files import check_writable, write_json
from haast.stats import Stats
from haast.target.load import load_stock, resolve

HERE = Path(__file__).parent


def weights_folder(model: str, scratch: Path) -> Path:
    """A model's folder with safetensors, for programs that read no GGUF file: its own, else a copy in `scratch`."""
    source = resolve(model)
    if source.gguf is None and Path(source.location).is_dir():
        return Path(source.location)
    folder = scratch / "weights"
    if not folder.exists():
        stock, tokenizer = load_stock(model)
        stock.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


class OtherSideError(Exception):
    """The other program did not answer; the message holds the end of its output."""


def ask(python: Path, script: str, request: dict[str, Any], seconds: float, **variables: str) -> dict[str, Any]:
    """Run a script of this folder in another environment.

    Args:
        python: the interpreter of that environment.
        script: its file name in this folder.
        request: the JSON values that it reads.
        seconds: time limit.
        **variables: additional environment variables.

    Raises:
        OtherSideError: no such interpreter, or the script failed or took too long.
    """
    if not python.is_file():
        needs = f"requirements-{script.removesuffix('_side.py')}.txt"
        raise OtherSideError(f"no interpreter at {python}: make a virtual environment with {HERE.name}/{needs}")
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        question.write_text(json.dumps(request), encoding="utf-8")
        passed = {
            name: value for name, value in os.environ.items() if name != "PYTHONPATH"
        }  # it names Haast's packages
        passed |= {"HF_HUB_OFFLINE": "1", **variables}
        done = run([str(python), str(HERE / script), str(question), str(answer)], seconds, passed)
        if done.returncode or not answer.is_file():
            raise OtherSideError(f"{script} failed:\n" + "\n".join(done.stderr.splitlines()[-25:]))
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def run(
    command: list[str], seconds: float, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program and capture its output as text. Raises OtherSideError if it takes too long."""
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds, env=variables
        )
    except subprocess.TimeoutExpired as error:
        raise OtherSideError(f"{Path(command[0]).name} took more than {seconds:.0f} s: raise --timeout") from error


def answers(model: Haast, prompts: list[list[int]], new: int) -> tuple[list[list[int]], Stats]:
    """Haast's greedy answers, one prompt at a time, and their summed acceptance counts."""
    total, texts = Stats(), []
    for ids in prompts:
        answer = model.generate(ids, max_new_tokens=new)
        texts.append(list(answer.tokens))
        print(f"Haast: {len(texts)} of {len(prompts)} prompts", file=sys.stderr, flush=True)
        for name in ("accepted_by_depth", "reached_by_depth"):
            summed, more = getattr(total, name), getattr(answer.stats, name)
            summed.extend([0] * (len(more) - len(summed)))
            setattr(total, name, [a + b for a, b in zip(summed, [*more, *[0] * len(summed)], strict=False)])
    return texts, total


def differences(model: str, prompts: list[list[int]], one: list[list[int]], other: list[list[int]]) -> list[Any]:
    """The first difference of each pair of answers, with the gap of the target's two best logits there."""
    found: list[dict[str, Any]] = []
    stock: Any = None
    for number, (ids, a, b) in enumerate(zip(prompts, one, other, strict=True)):
        if a == b:
            continue
        place = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
        stock = stock or load_stock(model)[0].eval()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            best = stock(torch.tensor([ids + a[:place]])).logits[0, -1].topk(2)
        differing = {tokens[place] for tokens in (a, b) if place < len(tokens)}  # one of them may have ended
        found.append(
            {
                "prompt": number,
                "place": place,
                "gap": float(best.values[0] - best.values[1]),
                "the_two_best": differing <= set(best.indices.tolist()),
            }
        )
    return found


def environment(versions: dict[str, str], settings: dict[str, Any]) -> dict[str, Any]:
    """The environment entry of a result, without paths of this machine."""
    words = [Path(word).name if word.startswith(("/", "..", "~")) else word for word in sys.argv[1:]]
    script = f"benchmarks/interop/{Path(sys.argv[0]).name}"
    return machine() | {
        "command": " ".join(["python", script, *words]),
        "other_versions": versions,
        "settings": settings,
        "dtype": "float32",
        "packing": "off",
    }


def checked(check: Callable[[argparse.Namespace], dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a script's check and write its result to `arguments.json`; exit with the message of an expected error."""
    try:
        check_writable(arguments.json)
        found = check(arguments)
        write_json(found, arguments.json)
    except (OtherSideError, HeadMismatchError, ValueError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from error
    return found
