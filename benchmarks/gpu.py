"""What a GPU makes of a step: losslessness, v(n), c, o, launches and reads per step, tokens a second at a given tau.

    make gpu                                    # on a machine with a GPU; at most eight minutes
    python benchmarks/gpu.py --tiny             # the same on the CPU, with models of a few thousand weights

Self-contained: Llamas of 1B and 8B shape whose random weights are made on the device, drafted for by an oracle that is
right with a given chance, so that tau is what is asked for; and the shipped head where its target is at hand. Every
drafted text is compared with vanilla's. Beside them stock `generate` of transformers decodes the same prompt. Each
model is measured eager, and with its decoder layers compiled (CUDA graphs on a GPU).

Writes results/gpu-<device>.json. Rounds are interleaved; times are medians. What a section can't do is said in the
file, and the other sections go on.
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
DEPTH = 6  # drafts of the oracle's chain


@dataclass(frozen=True)
class Size:
    """A model's shape and what is measured on it."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tokens: int  # new ones per text
    nodes: tuple[int, ...]


SIZES = (
    Size("llama-1b", 2048, 8192, 16, 32, 8, 128256, 128, (1, 2, 4, 8, 16, 32, 60)),
    Size("llama-8b", 4096, 14336, 32, 32, 8, 128256, 96, (1, 2, 4, 8, 16, 32, 60)),
)
TINY = (Size("llama-tiny", 64, 128, 2, 4, 2, 256, 24, (1, 2, 4, 8)),)


def chance_for(tau: float, depth: int = DEPTH) -> float:
    """How often each draft of a chain has to be right for so many tokens a step: tau = 1 + a + a^2 + ... + a^depth."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**d for d in range(depth + 1)) < tau else (low, middle)
    return (low + high) / 2


@dataclass
class _Known:
    """What the oracle keeps of a request: its text so far, and the text that will be."""

    text: list[int]
    answer: list[int]


class Oracle(Drafter):
    """Drafts a chain of the right tokens, each replaced by a wrong one with chance 1 - `chance`."""

    name = "oracle"

    def __init__(self, device: torch.device, texts: Sequence[Sequence[int]], chance: float, vocab: int) -> None:
        self._device, self._texts, self._chance, self._vocab = device, [list(text) for text in texts], chance, vocab

    @property
    def nodes(self) -> int:
        return DEPTH + 1

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> _Known:
        answer = next(text for text in self._texts if text[: len(prompt)] == list(prompt))
        return _Known(list(prompt[: reused + 1]), answer)

    def observe(self, states: Sequence[_Known], accepted: Accepted) -> None:
        for state, said in zip(states, accepted.host_tokens(), strict=True):
            state.text += said

    def propose(self, states: Sequence[_Known], budget: int | None = None) -> DraftTree:
        rows = []
        for state in states:
            at = len(state.text)
            drafts = [*state.answer[at : at + DEPTH], *[0] * DEPTH][:DEPTH]
            wrong = [keyed_uniform(0, at, depth) >= self._chance for depth in range(DEPTH)]
            rows.append([state.text[-1], *((d + no) % self._vocab for d, no in zip(drafts, wrong, strict=True))])
        return DraftTree.chain(to_device(torch.tensor(rows), self._device))


def build(size: Size, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama with random weights, made where it runs."""
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
    made: LlamaForCausalLM = model.eval()
    return made


def random_head(target: Target) -> Head:
    """A head of the target's sizes; what it drafts is noise, what it costs is not."""
    module = FeatExtrapolator(FeatExtrapolatorConfig.for_target(target.config)).to(target.dtype)
    return Head(module.eval().requires_grad_(False), None, {})


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, call: Callable[[], Any]) -> float:
    """Seconds of a call, with what it queued."""
    synchronize(device)
    begun = perf_counter()
    call()
    synchronize(device)
    return perf_counter() - begun


def complete(target: Target, drafter: Drafter, prompt: list[int], tokens: int, stats: Stats | None = None) -> list[int]:
    return Engine(target, drafter).complete([prompt], SamplingParams(), StopParams(tokens), stats)[0]


def decode_into(said: list[int], *given: Any) -> None:
    said.extend(complete(*given))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts operators; on the CPU they stand for launches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def per_step(target: Target, drafter: Drafter, prompt: list[int], tokens: int) -> dict[str, float]:
    """Kernel launches, copies to the host and waits per decoding step (operators on the CPU)."""
    complete(target, drafter, prompt, tokens)
    stats = Stats()
    if target.device.type != "cuda":
        if target.compiled is not None:
            return {}  # operators inside compiled code are not seen
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
    """transformers' own greedy `generate`."""
    ids = torch.tensor([prompt], device=model.device)
    owner: Any = model
    generate: Any = owner.generate
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: generate(ids, attention_mask=torch.ones_like(ids), **settings)


def measure(size: Size, device: torch.device, dtype: torch.dtype, compiled: bool, rounds: int) -> dict[str, Any]:
    """All figures of one model, eager or compiled."""
    model = build(size, device, dtype)
    reference = stock(model, list(range(5, 69)), size.tokens)
    target = Target(model)
    if compiled:
        target.use_compiled_layers("inductor" if device.type == "cuda" else "eager")  # compiling C++ takes minutes
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
            said: list[int] = []
            took = timed(device, partial(decode_into, said, target, drafter, prompt, tokens, stats))
            same[name] = same.get(name, True) and said == expected
            taus[name] = stats.tau
            if turn:
                seconds[name].append(took)
        took = timed(device, reference)
        if turn:
            seconds["stock"].append(took)
    curve = measure_v_curve(target, eagle, max(rounds, 3), size.nodes)
    one = curve["points"][0]["ms"]
    speeds = {name: tokens / median(values) for name, values in seconds.items()}
    counted = {"vanilla": vanilla, "eagle": eagle}
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
        "per_step": {name: per_step(target, each, prompt, 16) for name, each in counted.items()},
        "tokens_per_s": speeds,
        "tau": taus,
        "speedup_over_vanilla": {name: speeds[name] / speeds["vanilla"] for name in speeds},
        "speedup_over_stock": {name: speeds[name] / speeds["stock"] for name in speeds},
    }


def shipped(device: torch.device, dtype: str, tokens: int) -> dict[str, Any]:
    """The shipped head on its target: lossless, tau and tokens a second beside vanilla."""
    from haast.api import find_head
    from haast.heads.checkpoint import load_head

    folder = find_head("default", DEFAULT_MODEL)
    assert folder is not None, "it is shipped"
    target = load_target(DEFAULT_MODEL, dtype=dtype, device=str(device), packing="off")
    drafters: dict[str, Drafter] = {"vanilla": VanillaDrafter(), "eagle": EagleDrafter(target, load_head(folder))}
    messages = [{"role": "user", "content": "Explain to a child why the sky is blue."}]
    tokenizer: Any = target.tokenizer
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    prompt, found = list(encoded["input_ids"]), dict[str, Any]()
    texts = {name: complete(target, drafter, prompt, tokens) for name, drafter in drafters.items()}
    for name, drafter in drafters.items():
        stats = Stats()
        took = timed(device, partial(complete, target, drafter, prompt, tokens, stats))
        found[name] = {"tokens_per_s": len(texts[name]) / took, "tau": stats.tau}
    return {"model": DEFAULT_MODEL, "lossless": texts["vanilla"] == texts["eagle"], **found}


def guarded(name: str, section: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A section's figures, or why there are none."""
    begun = perf_counter()
    try:
        found = section()
    except Exception as error:
        traceback.print_exc()
        found = {"section": name, "failed": f"{type(error).__name__}: {error}"}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"{name}: {perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    return found | {"seconds": round(perf_counter() - begun, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, for any machine")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=480.0, help="sections that would begin later are left out")
    parser.add_argument("--json", type=Path, help="default: results/gpu-<device>.json")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cpu" and not given.tiny:
        parser.error("no GPU is here: give --tiny, or --device")
    sizes, dtype = (TINY, torch.float32) if given.tiny else (SIZES, torch.bfloat16)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    path = given.json or Path("results") / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    begun, sections = perf_counter(), list[dict[str, Any]]()
    plans: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (f"{size.name}, {'compiled' if compiled else 'eager'}",
         partial(measure, size, device, dtype, compiled, given.rounds))
        for compiled in (False, True) for size in sizes
    ]  # fmt: skip
    if not given.tiny:
        plans.insert(0, ("shipped head", partial(shipped, device, "bfloat16", 128)))
    for title, plan in plans:
        if perf_counter() - begun > given.seconds:
            sections.append({"section": title, "failed": f"left out after {given.seconds:g} s"})
            continue
        sections.append(guarded(title, plan))
        write_json({"kind": "gpu", "device": name, "sections": sections, **machine()}, str(path))
    lossless = [each["lossless"] for each in sections if "lossless" in each]
    print(f"{path}: lossless {lossless}")


if __name__ == "__main__":
    main()
