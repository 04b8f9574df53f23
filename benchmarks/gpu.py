"""GPU benchmark: losslessness, v(n), c, o, launches and host reads per step, and tokens per second at a given tau.

    make gpu                                    # on a machine with a GPU; at most eight minutes
    python benchmarks/gpu.py --tiny             # the same on the CPU, with models of a few thousand weights

Self-contained: Llamas of 1B and 8B shape with random weights that are created on the device. An oracle drafts for them
and is right with a probability that gives the wanted tau. The shipped head is measured too if its target is available.
Every drafted text is compared with vanilla's, and stock `generate` of transformers decodes the same prompt. Each model
is measured in eager mode and with compiled decoder layers (CUDA graphs on a GPU).

Writes results/gpu-<device>.json. Rounds are interleaved; times are medians. The file records the error of a failed
section, and the other sections still run.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from haast.bench.calibrate import measure_v_curve
from haast.bench.report import machine
from haast.core import Accepted, SamplingParams, StopParams
from haast.device import to_device
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine
from haast.files import write_json
from haast.heads.checkpoint import Head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.sampling import keyed_uniform
from haast.stats import Stats
from haast.target.kv_pool import Sequence as KVSequence
from haast.target.load import DEFAULT_MODEL, load_target
from haast.target.target import Target
from haast.tree import DraftTree

TAUS = (2.0, 3.0, 4.0)
DEPTH = 6  # length of the oracle's draft chain


@dataclass(frozen=True)
class Size:
    """The shape of a model, and the settings of its measurement."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tokens: int  # new tokens per text
    nodes: tuple[int, ...]


SIZES = (
    Size("llama-1b", 2048, 8192, 16, 32, 8, 128256, 128, (1, 2, 4, 8, 16, 32, 60)),
    Size("llama-8b", 4096, 14336, 32, 32, 8, 128256, 96, (1, 2, 4, 8, 16, 32, 60)),
)
TINY = (Size("llama-tiny", 64, 128, 2, 4, 2, 256, 24, (1, 2, 4, 8)),)


def chance_for(tau: float, depth: int = DEPTH) -> float:
    """The acceptance rate a of each draft in a chain that gives this tau: tau = 1 + a + a^2 + ... + a^depth."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**d for d in range(depth + 1)) < tau else (low, middle)
    return (low + high) / 2


@dataclass
class _OracleState:
    """The oracle's state of a request: its text so far, and its final text."""

    text: list[int]
    answer: list[int]


class Oracle(Drafter):
    """Drafts a chain of the right tokens, each replaced by a wrong one with probability 1 - `chance`."""

    name = "oracle"

    def __init__(self, device: torch.device, texts: Sequence[Sequence[int]], chance: float, vocab: int) -> None:
        self._device, self._texts, self._chance, self._vocab = device, [list(text) for text in texts], chance, vocab

    @property
    def nodes(self) -> int:
        return DEPTH + 1

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> _OracleState:
        answer = next(text for text in self._texts if text[: len(prompt)] == list(prompt))
        return _OracleState(list(prompt[: reused + 1]), answer)

    def observe(self, states: Sequence[_OracleState], accepted: Accepted) -> None:
        for state, tokens in zip(states, accepted.host_tokens(), strict=True):
            state.text += tokens

    def propose(self, states: Sequence[_OracleState], budget: int | None = None) -> DraftTree:
        rows = []
        for state in states:
            at = len(state.text)
            drafts = [*state.answer[at : at + DEPTH], *[0] * DEPTH][:DEPTH]
            wrong = [keyed_uniform(0, at, depth) >= self._chance for depth in range(DEPTH)]
            rows.append([state.text[-1], *((d + no) % self._vocab for d, no in zip(drafts, wrong, strict=True))])
        return DraftTree.chain(to_device(torch.tensor(rows), self._device))


def build(size: Size, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama with random weights, created on its device."""
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=2048,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    llama: LlamaForCausalLM = model.eval()
    return llama


def random_head(target: Target) -> Head:
    """An untrained head of the target's sizes: its drafts are noise, its cost is real."""
    module = FeatExtrapolator(FeatExtrapolatorConfig.for_target(target.config)).to(target.dtype)
    return Head(module.eval().requires_grad_(False), None, {})


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, call: Callable[[], Any]) -> float:
    """Seconds of a call, including the work that it queued on the device."""
    synchronize(device)
    begin = perf_counter()
    call()
    synchronize(device)
    return perf_counter() - begin


def complete(target: Target, drafter: Drafter, prompt: list[int], tokens: int, stats: Stats | None = None) -> list[int]:
    return Engine(target, drafter).complete([prompt], SamplingParams(), StopParams(tokens), stats)[0]


def decode_into(tokens: list[int], *arguments: Any) -> None:
    tokens.extend(complete(*arguments))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Counts operators, which stand for kernel launches on the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def per_step(target: Target, drafter: Drafter, prompt: list[int], tokens: int) -> dict[str, float]:
    """Kernel launches, copies to the host and synchronisations per decoding step; on the CPU, operators."""
    complete(target, drafter, prompt, tokens)
    stats = Stats()
    if target.device.type != "cuda":
        if target.compiled is not None:
            return {}  # operators inside compiled code are not dispatched
        mode = _Operators()
        with mode:
            complete(target, drafter, prompt, tokens, stats)
        return {"operators": mode.count / stats.target_forwards}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        complete(target, drafter, prompt, tokens, stats)
    counts: Counter[str] = Counter()
    for event in recorded.events():
        name = event.name
        if name in ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cudaGraphLaunch"):
            counts["graph_launches" if name == "cudaGraphLaunch" else "launches"] += 1
        elif name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"):
            counts["waits"] += 1
        elif "Memcpy DtoH" in name:
            counts["copies_to_host"] += 1
    return {name: count / stats.target_forwards for name, count in counts.items()}


def stock(model: LlamaForCausalLM, prompt: list[int], tokens: int) -> Callable[[], Any]:
    """A call of transformers' greedy `generate`."""
    ids = torch.tensor([prompt], device=model.device)
    owner: Any = model
    generate: Any = owner.generate
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: generate(ids, attention_mask=torch.ones_like(ids), **settings)


def measure(size: Size, device: torch.device, dtype: torch.dtype, compiled: bool, rounds: int) -> dict[str, Any]:
    """All measurements of one model, eager or compiled."""
    model = build(size, device, dtype)
    reference = stock(model, list(range(5, 69)), size.tokens)
    target = Target(model)
    if compiled:
        target.use_compiled_layers(
            "inductor" if device.type == "cuda" else "eager"
        )  # on the CPU, inductor compiles C++ for minutes
    prompt, tokens = list(range(5, 69)), size.tokens
    vanilla, eagle = VanillaDrafter(), EagleDrafter(target, random_head(target), DraftShape(nodes=max(size.nodes)))
    expected = complete(target, vanilla, prompt, tokens)
    text = [*prompt, *expected, *[0] * DEPTH]
    arms: dict[str, Drafter] = {"vanilla": vanilla}
    arms |= {f"tau {tau:g}": Oracle(device, [text], chance_for(tau), size.vocab) for tau in TAUS}
    seconds: dict[str, list[float]] = {name: [] for name in [*arms, "stock"]}
    taus: dict[str, float] = {}
    same = {"eagle, a random head": complete(target, eagle, prompt, tokens) == expected}
    for turn in range(rounds + 1):
        for name, drafter in arms.items():
            stats = Stats()
            decoded: list[int] = []
            took = timed(device, partial(decode_into, decoded, target, drafter, prompt, tokens, stats))
            same[name] = same.get(name, True) and decoded == expected
            taus[name] = stats.tau
            if turn:
                seconds[name].append(took)
        took = timed(device, reference)
        if turn:
            seconds["stock"].append(took)
    curve = measure_v_curve(target, eagle, max(rounds, 3), size.nodes)
    one = curve["points"][0]["ms"]
    speeds = {name: tokens / median(values) for name, values in seconds.items()}
    profiled = {"vanilla": vanilla, "eagle": eagle}
    step = 1e3 * median(seconds["vanilla"]) / tokens
    return {
        "model": size.name,
        "mode": "compiled" if compiled else "eager",
        "compiling": target.compiling,
        "dtype": str(dtype).removeprefix("torch."),
        "lossless": same,
        "v": {str(point["nodes"]): point["v"] for point in curve["points"]},
        "ms_one_node": one,
        "c_per_step": curve["draft"]["c_per_step"],
        "o": max(step - one, 0.0) / one,
        "per_step": {name: per_step(target, each, prompt, 16) for name, each in profiled.items()},
        "tokens_per_s": speeds,
        "tau": taus,
        "speedup_over_vanilla": {name: speeds[name] / speeds["vanilla"] for name in speeds},
        "speedup_over_stock": {name: speeds[name] / speeds["stock"] for name in speeds},
    }


def shipped(device: torch.device, dtype: str, tokens: int) -> dict[str, Any]:
    """The shipped head on its target: losslessness, and tau and tokens per second of vanilla and eagle."""
    from haast.api import find_head
    from haast.heads.checkpoint import load_head

    folder = find_head("default", DEFAULT_MODEL)
    assert folder is not None, "it is shipped"
    target = load_target(DEFAULT_MODEL, dtype=dtype, device=str(device), packing="off")
    drafters: dict[str, Drafter] = {"vanilla": VanillaDrafter(), "eagle": EagleDrafter(target, load_head(folder))}
    messages = [{"role": "user", "content": "Explain to a child why the sky is blue."}]
    tokenizer: Any = target.tokenizer
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    prompt, measured = list(encoded["input_ids"]), dict[str, Any]()
    texts = {name: complete(target, drafter, prompt, tokens) for name, drafter in drafters.items()}
    for name, drafter in drafters.items():
        stats = Stats()
        took = timed(device, partial(complete, target, drafter, prompt, tokens, stats))
        measured[name] = {"tokens_per_s": len(texts[name]) / took, "tau": stats.tau}
    return {"model": DEFAULT_MODEL, "lossless": texts["vanilla"] == texts["eagle"], **measured}


def guarded(name: str, section: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The measurements of a section, or its error."""
    begin = perf_counter()
    try:
        result = section()
    except Exception as error:
        traceback.print_exc()
        result = {"section": name, "failed": f"{type(error).__name__}: {error}"}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"{name}: {perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return result | {"seconds": round(perf_counter() - begin, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, for any machine")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=480.0, help="skip sections that would start after this time")
    parser.add_argument("--json", type=Path, help="default: results/gpu-<device>.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu" and not arguments.tiny:
        parser.error("this machine has no GPU: give --tiny, or --device")
    sizes, dtype = (TINY, torch.float32) if arguments.tiny else (SIZES, torch.bfloat16)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    path = arguments.json or Path("results") / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    begin, sections = perf_counter(), list[dict[str, Any]]()
    plans: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (f"{size.name}, {'compiled' if compiled else 'eager'}",
         partial(measure, size, device, dtype, compiled, arguments.rounds))
        for compiled in (False, True) for size in sizes
    ]  # fmt: skip
    if not arguments.tiny:
        plans.insert(0, ("shipped head", partial(shipped, device, "bfloat16", 128)))
    for title, plan in plans:
        if perf_counter() - begin > arguments.seconds:
            sections.append({"section": title, "failed": f"skipped after {arguments.seconds:g} s"})
            continue
        sections.append(guarded(title, plan))
        write_json({"kind": "gpu", "device": name, "sections": sections, **machine()}, str(path))
    lossless = [each["lossless"] for each in sections if "lossless" in each]
    print(f"{path}: lossless {lossless}")


if __name__ == "__main__":
    main()
