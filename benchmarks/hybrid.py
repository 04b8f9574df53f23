"""Costs of a model with recurrent layers: forwards, rows, memory, and drafted against vanilla decoding.

    python benchmarks/hybrid.py --family qwen3_5_text --json results/hybrid.json
    python benchmarks/hybrid.py --family lfm2 --hidden 64 --layers 4 --vocab 512 --rounds 1 --tokens 16 --json -

Builds a model of 100 to 300 million parameters with random weights. Measures

    v(n)     ms of a forward over n nodes, as a chain (one call of each recurrent layer per node) and as a tree of
             depth 2 (three calls), with the attention-only share of the layers beside it
    rows     nodes that recurrent layers compute per node of a step: 1 if nothing is computed twice
    memory   recurrent states per text, per node of a step, and kept with prefixes; keys and values per token
    speed    tokens per second of vanilla, of the suffix drafter, and of a drafter that is right at a given rate, on
             greedy text (random weights repeat themselves: much to gain) and on text sampled at temperature 1 (nothing
             to gain, so that drafting must not cost anything)

Decoders are interleaved; a row is the median of the rounds. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from haast.bench.report import environment
from haast.core import SamplingParams, StopParams
from haast.drafters.base import Drafter
from haast.drafters.factory import make_drafter
from haast.engine.engine import Engine, Stats
from haast.files import write_json
from haast.target.fusing import fuse_small_modules
from haast.target.mixers import Caller
from haast.target.packing import pack_linears
from haast.target.target import Target
from haast.tree import DraftTree

NODES = (1, 2, 4, 8, 16, 32)
_CONTEXT, _FORWARDS, _PROMPT = 160, 15, 120


def settings(family: str, hidden: int, layers: int, vocab: int) -> dict[str, Any]:
    """The configuration of a family: one layer of attention in four."""
    head = min(64, hidden // 4)
    heads = hidden // head
    kinds = {"lfm2": "conv"}.get(family, "linear_attention")
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 4, 1),
        "head_dim": head,
        "max_position_embeddings": 4096,
        "layer_types": ["full_attention" if number % 4 == 3 else kinds for number in range(layers)],
        "tie_word_embeddings": True,
        "eos_token_id": None,
    }
    own: dict[str, dict[str, Any]] = {
        "qwen3_5_text": {
            "linear_num_key_heads": heads // 2,
            "linear_num_value_heads": heads,
            "linear_key_head_dim": 2 * head,
            "linear_value_head_dim": head,
        },
        "lfm2": {"conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
        "granitemoehybrid": {
            "mamba_n_heads": heads,
            "mamba_d_head": 2 * head,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
            "shared_intermediate_size": 11 * hidden // 4,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
        },
    }
    if family not in own:
        raise ValueError(f"family={family!r} is unknown: choose one of {', '.join(own)}")
    return {**common, **own[family]}


def build(family: str, hidden: int, layers: int, vocab: int, packing: str) -> Target:
    """A model with random weights, packed to 16 bits with packing "f16"."""
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(family, **settings(family, hidden, layers, vocab)))
    target = Target(model)
    if packing == "f16":
        pack_linears(target.model)
        fuse_small_modules(target.model)
    return target


def tree_of(nodes: int, deep: bool, vocab: int) -> DraftTree:
    """A chain, or a tree of depth 2 whose nodes are split between both depths."""
    tokens = torch.arange(nodes).unsqueeze(0) % vocab
    if deep:
        return DraftTree.chain(tokens)
    first = max((nodes - 1) // 2, 1)
    parents = [-1, *([0] * first), *(1 + i % first for i in range(nodes - 1 - first))][:nodes]
    return DraftTree.from_parents(tokens, torch.tensor([parents]), height=min(2, nodes - 1))


def forwards(target: Target) -> list[dict[str, Any]]:
    """ms of a forward after `_CONTEXT` positions, by nodes: of a chain, of a tree, and inside of recurrent layers."""
    rows = []
    with target.step_threads(), torch.inference_mode():
        cache = target.new_cache(1, 2 * _CONTEXT + max(NODES))
        tokens = torch.arange(_CONTEXT).unsqueeze(0) % target.vocab_size
        target.forward(DraftTree.chain(tokens), cache, last_only=True)
        cache.advance([_CONTEXT])
        for nodes in NODES:
            row: dict[str, Any] = {"nodes": nodes}
            for name, deep in (("chain", True), ("tree", False)):
                tree = tree_of(nodes, deep, target.vocab_size)
                times, inside = [], []
                for _ in range(_FORWARDS):
                    with counted() as count:
                        start = time.perf_counter()
                        target.forward(tree, cache)
                        times.append(1e3 * (time.perf_counter() - start))
                    inside.append(1e3 * count.seconds)
                mixers = len(target.probed.layout.mixers) if target.probed.layout else 1
                row[name] = {
                    "ms": median(times),
                    "recurrent_ms": median(inside),
                    "calls_per_layer": count.calls / mixers,
                    "rows_per_node": count.rows / mixers / nodes,
                }
            rows.append(row)
    for row in rows:
        for name in ("chain", "tree"):
            row[name]["v"] = row[name]["ms"] / rows[0][name]["ms"]
    return rows


class Count:
    """Calls of recurrent layers, the nodes that they computed, and the time inside."""

    def __init__(self) -> None:
        self.calls = self.rows = 0
        self.seconds = 0.0


@contextmanager
def counted() -> Iterator[Count]:
    """Count the calls of recurrent layers inside the block."""
    count, call = Count(), Caller.call

    def counting(self: Caller, forward: Any, arguments: Any, shape: Any, index: Any, states: Any) -> Any:
        count.calls += 1
        count.rows += index.numel()
        start = time.perf_counter()
        result = call(self, forward, arguments, shape, index, states)
        count.seconds += time.perf_counter() - start
        return result

    Caller.call = counting  # type: ignore[method-assign]
    try:
        yield count
    finally:
        Caller.call = call  # type: ignore[method-assign]


def memory(target: Target) -> dict[str, Any]:
    """Bytes of states, snapshots, keys and values."""
    layout, snapshots = target.probed.layout, target.pool.snapshots
    if layout is None or snapshots is None:
        raise RuntimeError("the model has no recurrent layers")
    return {
        "recurrent_layers": len(layout.mixers),
        "attention_layers": len(layout.attention_layers),
        "state_bytes": layout.nbytes,
        "kv_bytes_per_token": target.kv_bytes_per_token,
        "state_in_tokens_of_kv": layout.nbytes / max(target.kv_bytes_per_token, 1),
        "snapshot_limit_bytes": snapshots.limit,
        "pool_tokens": target.pool.tokens,
    }


def prompts(kind: str, count: int, vocab: int) -> list[list[int]]:
    """Texts of `_PROMPT` tokens: a phrase repeated, or random tokens."""
    rng = random.Random(0)
    phrases = [rng.choices(range(vocab), k=20 if kind == "repeated" else _PROMPT) for _ in range(count)]
    return [(phrase * _PROMPT)[:_PROMPT] for phrase in phrases]


def speed(target: Target, count: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Tokens per second of vanilla and drafted decoding, one text at a time."""
    drafters: dict[str, Drafter] = {name: make_drafter(name, target) for name in ("none", "suffix", "lookahead")}
    rows = []
    for text, temperature in (("repeated", 0.0), ("random", 1.0)):
        seconds: dict[str, list[float]] = {name: [] for name in drafters}
        said: dict[str, list[list[int]]] = {}
        stats = {name: Stats() for name in drafters}
        for number in range(rounds):
            order = list(drafters)[number % len(drafters) :] + list(drafters)[: number % len(drafters)]
            for name in order:
                target.pool.clear()
                begin = time.perf_counter()
                said[name] = [
                    run(target, drafters[name], prompt, temperature, tokens, stats[name])
                    for prompt in prompts(text, count, target.vocab_size)
                ]
                seconds[name].append(time.perf_counter() - begin)
        vanilla = median(seconds["none"])
        for name in drafters:
            same = sum(one == other for one, other in zip(said[name], said["none"], strict=True))
            new = sum(map(len, said[name]))
            rows.append(
                {
                    "text": text,
                    "temperature": temperature,
                    "decoder": "vanilla" if name == "none" else name,
                    "tokens_per_s": new / median(seconds[name]),
                    "speedup": vanilla / median(seconds[name]),
                    "tau": stats[name].tau,
                    "same_text": f"{same} of {count}",
                }
            )
    return rows


def run(
    target: Target, drafter: Drafter, prompt: Sequence[int], temperature: float, tokens: int, stats: Stats
) -> list[int]:
    """The new tokens of one prompt."""
    sampling = SamplingParams(temperature=temperature, seed=1)
    return Engine(target, drafter).complete([prompt], sampling, StopParams(tokens), stats)[0]


def main() -> None:
    """Run all parts and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen3_5_text", help="qwen3_5_text, lfm2 or granitemoehybrid")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--packing", choices=("f16", "off"), default="f16")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", required=True, help="a file, or - for stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    target = build(arguments.family, arguments.hidden, arguments.layers, arguments.vocab, arguments.packing)
    parameters = sum(
        int(torch.Size(each.shape).numel()) for each in (*target.model.parameters(), *target.model.buffers())
    )
    document = {
        "kind": "hybrid",
        "family": arguments.family,
        "parameters": parameters,
        "forwards": forwards(target),
        "memory": memory(target),
        "decoding": speed(target, arguments.prompts, arguments.tokens, arguments.rounds),
        "environment": environment(
            target, f"{arguments.family}, random weights", None, arguments.prompts, vars(arguments)
        ),
    }
    write_json(document, arguments.json)


if __name__ == "__main__":
    main()
