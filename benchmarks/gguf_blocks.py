"""Measures GGUF files kept in their blocks: time and memory to load, quality, and the cost of a forward.

    python benchmarks/gguf_blocks.py model-Q4_K_M.gguf model-Q8_0.gguf --text docs/*.md --json results/gguf.json
    python benchmarks/gguf_blocks.py model-Q4_K_M.gguf --text docs/*.md --llama-python PATH --json results/gguf.json

Quality: perplexity of `--tokens` tokens of the text in pieces of 512, each with the model's start token, of the file's
blocks (`packing="gguf"`), of the same weights dequantised (fp32, `packing="off"`), and of llama.cpp if an interpreter
with llama-cpp-python is given; the KL divergence of the first from the second, and how often they agree on the most
likely token. Each file is loaded in processes of its own, so that peak memory is its own: that of loading, the
first token and a prompt of 160 tokens. The JSON is written after every part, and parts that it has are kept, so the
same command resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

PIECE = 512
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
_CONTEXT, _ROUNDS = 160, 15


def main() -> None:
    """Run all parts for all files, write the JSON and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--text", type=Path, nargs="+", default=[])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-python", help="interpreter with llama-cpp-python")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](**json.loads(sys.stdin.read()))))
        return
    missing = [str(path) for path in (*arguments.files, *arguments.text) if not path.is_file()]
    if missing or not arguments.files or not arguments.text or arguments.json is None:
        parser.error(f"no such files: {missing}" if missing else "give GGUF files, --text and --json")
    from haast.bench.report import machine
    from haast.files import write_json

    texts = sorted(arguments.text)
    text = "\n".join(path.read_text(encoding="utf-8") for path in texts)
    names = " ".join(file.name for file in arguments.files)
    settings = {"tokens": arguments.tokens, "threads": arguments.threads, "piece": PIECE, "context": _CONTEXT}
    where = machine() | {
        "command": f"python benchmarks/gguf_blocks.py {names} --text {' '.join(path.name for path in texts)}",
        "dtype": "float32",
        "packing": "gguf",
        "settings": settings,
    }
    before = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"rows": []}
    if before["rows"] and before["environment"]["settings"] != settings:
        parser.error(f"{arguments.json} was measured with {before['environment']['settings']}: give another --json")
    rows = {row["file"]: row for row in before["rows"]}

    def write(rows: dict[str, dict[str, Any]]) -> None:
        write_json({"kind": "gguf", "rows": list(rows.values()), "environment": where}, str(arguments.json))

    for file in arguments.files:
        row = rows.setdefault(file.name, {"file": file.name, "mb": file.stat().st_size / 1e6})
        common: dict[str, Any] = {"file": str(file), "threads": arguments.threads}
        if "load_s" not in row:
            row |= _part("load", sys.executable, **common)
            write(rows)
        if "kl" not in row or (arguments.llama_python and "ppl_llama_cpp" not in row):
            quality = _part("quality", sys.executable, text=text, tokens=arguments.tokens, **common)
            ids = quality.pop("ids")
            row |= quality
            if arguments.llama_python:
                row |= _part("llama", arguments.llama_python, ids=ids, **common)
            write(rows)
        print(_line(row), flush=True)


def _part(name: str, python: str, **arguments: Any) -> dict[str, Any]:
    command = [python, __file__, "--part", name]
    done = subprocess.run(command, input=json.dumps(arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} of {arguments['file']} failed: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def load(file: str, threads: int) -> dict[str, Any]:
    """Seconds and memory from the first import to the first token; then milliseconds of a forward by rows."""
    import torch

    begin = time.perf_counter()
    from haast.target.load import load_target
    from haast.tree import DraftTree

    imported = time.perf_counter()
    torch.set_num_threads(threads)
    before = _memory("VmRSS")
    target = load_target(file)
    loaded = time.perf_counter()
    ids = torch.arange(100, 100 + _CONTEXT).unsqueeze(0)
    milliseconds = {}
    with target.step_threads(), torch.inference_mode():
        target.forward(DraftTree.chain(ids[:, :8]), target.new_cache(1, 64))
        first = time.perf_counter()
        cache = target.new_cache(1, 512)
        target.forward(DraftTree.chain(ids), cache, last_only=True)  # as prefill does
        cache.advance([_CONTEXT])
        memory = {"rss_mb": _memory("VmRSS"), "peak_rss_mb": _memory("VmHWM")}
        for rows in ROWS:
            tree, times = DraftTree.chain(ids[:, :rows]), []
            for _ in range(_ROUNDS):
                start = time.perf_counter()
                target.forward(tree, cache)
                times.append(1e3 * (time.perf_counter() - start))
            milliseconds[str(rows)] = median(times)
    return {
        "import_s": imported - begin,
        "load_s": loaded - imported,
        "first_token_s": first - imported,
        "rss_before_mb": before,
        **memory,
        "forward_ms": milliseconds,
        "one_call": target.one_call,
        "forms": _forms(target),
    }


def _forms(target: Any) -> dict[str, int]:
    from haast.target.packing import is_packed

    counts: dict[str, int] = {}
    for module in target.model.modules():
        if is_packed(module):
            counts[module.form] = counts.get(module.form, 0) + 1
    return counts


def quality(file: str, threads: int, text: str, tokens: int) -> dict[str, Any]:
    """Perplexities, KL divergence and agreement of the file's blocks and of its dequantised weights."""
    import torch

    from haast.target.load import load_target
    from haast.tree import DraftTree

    torch.set_num_threads(threads)
    targets = [load_target(file, packing=packing) for packing in ("gguf", "off")]
    tokenizer = targets[0].tokenizer
    assert tokenizer is not None, "a GGUF file has one"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else ids[0]
    losses, divergence, agree, count = [0.0, 0.0], 0.0, 0, 0
    with torch.inference_mode():
        for piece in _pieces(ids, start):
            logprobs = []
            for number, target in enumerate(targets):
                tree = DraftTree.chain(torch.tensor([piece]))
                logits = target.forward(tree, target.new_cache(1, PIECE + 16)).logits[0, :-1]
                logprobs.append(logits.double().log_softmax(-1))
                following = torch.tensor(piece[1:]).unsqueeze(1)
                losses[number] -= float(logprobs[-1].gather(1, following).sum())
            ours, dense = logprobs
            divergence += float((dense.exp() * (dense - ours)).sum())
            agree += int((ours.argmax(-1) == dense.argmax(-1)).sum())
            count += len(piece) - 1
    blocks, dense_ppl = (math.exp(loss / count) for loss in losses)
    return {
        "ppl_blocks": blocks,
        "ppl_dense": dense_ppl,
        "kl": divergence / count,
        "top_1": agree / count,
        "tokens": count,
        "ids": [start, *ids],
    }


def llama(file: str, threads: int, ids: list[int]) -> dict[str, Any]:
    """llama.cpp's perplexity of the same pieces."""
    import llama_cpp
    import numpy as np

    counts = {"n_ctx": PIECE + 16, "n_batch": PIECE, "n_threads": threads, "n_threads_batch": threads}
    model = llama_cpp.Llama(file, logits_all=True, verbose=False, **counts)
    total, count = 0.0, 0
    for piece in _pieces(ids[1:], ids[0]):
        model.reset()
        model.eval(piece)
        logits = np.asarray(model.scores[: len(piece) - 1], dtype=np.float64)
        top = logits.max(-1, keepdims=True)
        normal = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
        total += float((normal - logits[np.arange(len(piece) - 1), piece[1:]]).sum())
        count += len(piece) - 1
    return {"ppl_llama_cpp": math.exp(total / count), "llama_cpp": llama_cpp.__version__}


def _pieces(ids: list[int], start: int) -> list[list[int]]:
    return [[start, *ids[at : at + PIECE - 1]] for at in range(0, len(ids), PIECE - 1)]


def _memory(name: str) -> float:
    """MB of this process: `VmRSS` now, `VmHWM` the peak."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def _line(row: dict[str, Any]) -> str:
    theirs = f", llama.cpp {row['ppl_llama_cpp']:.4f}" if "ppl_llama_cpp" in row else ""
    forward = ", ".join(f"{rows}: {row['forward_ms'][rows]:.2f}" for rows in ("1", "6", "12"))
    return (
        f"{row['file']}: {row['mb']:.0f} MB, first token {row['first_token_s']:.2f} s, "
        f"peak {row['peak_rss_mb']:.0f} MB, ppl {row['ppl_blocks']:.4f} (dequantised {row['ppl_dense']:.4f}{theirs}), "
        f"KL {row['kl']:.5f}, top-1 {row['top_1']:.3f}, ms by rows {forward}"
    )


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"load": load, "quality": quality, "llama": llama}

if __name__ == "__main__":
    main()
