"""Probe of a model: short forwards, run once, that check whether Haast can verify trees with it.

Measures whether the model keeps its state in Haast's cache, whether the decoder's output is what the LM head reads, by
how much logits are scaled, and whether it can be drafted for. For that it must be causal, its logits with Haast's
masks, positions and cache must be those of its own forward, and a tree node's logits those of the node's path alone.

The probe's texts are ten tokens long, so it narrows a sliding window to `_WINDOW`. Both transformers and Haast build
masks from the configuration in each forward, with the same code for every window size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from haast.errors import UnsupportedModelError
from haast.target.device_map import mesh_of
from haast.target.fusing import FusedAttention
from haast.target.hf import ModuleForward, TargetOutput
from haast.target.kv_cache import KVCache
from haast.target.kv_pool import KVPool
from haast.target.mixers import Layout, find_layout
from haast.target.packing import exact_products
from haast.target.precision import quantisation
from haast.target.support import choose_attention, has_recurrent_layers, prepared_inputs
from haast.tree import DraftTree

# Largest differences by rounding between logits that should be equal, as `Gap` measures them: spread, KL, top. Measured
# at most over the models of tests/zoo.py and SmolLM2-135M: 6e-6, 7e-11 and 0 in float32; 0.06, 0.004 and 0 in bfloat16;
# 0.011, 2e-4 and 0 in float16 (best of three texts). Faults (a mask that shows a sibling or hides a token, a window too
# wide by one, positions from cache slots) change the spread by 0.04 or more (tests/target/test_probe.py), that of
# SmolLM2 by 0.2.
_ALLOWED = {
    torch.float64: (1e-5, 1e-9, 1e-4),
    torch.float32: (1e-3, 1e-5, 1e-2),  # some GPUs multiply float32 with ten bits
    torch.float16: (0.02, 2e-3, 0.1),
    torch.bfloat16: (0.1, 0.03, 0.4),
}
_EXACT = (torch.float64, torch.float32)
_SAME_SHAPE = 0.2  # share of these bounds for two forwards of equal shape, which compute the same sums
_AT_A_TIME = 4  # tokens whose logits are compared at a time: in float64 they would set the peak of memory
_TRIALS = 3  # texts in 16 bits: rounding may change an expert router's choice, but a real fault shows in every text
_WINDOW = 4
_PAST, _SHORT_PAST, _PATH = 6, 3, 4  # tokens of the committed past, of the third row's past, and of the path after it
# `_ON` are the path's nodes. `_OFF`: two nodes branch off after its first node, and one leaf is a sibling of its last.
_PARENTS = (-1, 0, 1, 0, 3, 4, 4)
_ON = (0, 3, 4, 6)
_OFF = (1, 2, 5)
# What a model raises for inputs that it does not expect, its own asserts included.
_FAILURES = (TypeError, LookupError, AttributeError, RuntimeError, ValueError, AssertionError, ArithmeticError)


def tolerance(dtype: torch.dtype) -> float:
    """Largest allowed difference of logits that should be equal, relative to the largest magnitude."""
    return _ALLOWED[dtype][0] if dtype in _EXACT else 0.2


@dataclass(frozen=True)
class ProbeResult:
    """Result of a probe. It stays valid for the model's lifetime, so the next `Target` of it needs no probe."""

    decoder_gives_features: bool  # the decoder's output is what the LM head reads
    logit_scale: float
    kv_bytes_per_token: int = 0  # bytes of one token's keys and values, in the model's own dtypes
    widths: tuple[int, int] = (0, 0)  # of an embedding and of a feature; both are the hidden size in most models
    layout: Layout | None = None  # of a model with recurrent layers


@dataclass(frozen=True)
class Gap:
    """Difference between a token's logits and the expected ones."""

    spread: float  # root mean square of the difference divided by that of the logits, both about their mean
    kl: float  # KL divergence from the expected distribution, nats
    top: float  # expected log-probability of the expected top token minus that of the actual top token, nats

    def within(self, dtype: torch.dtype, share: float = 1.0) -> bool:
        """Whether it is within `share` of the rounding that `dtype` allows. False for NaN."""
        bounds = _ALLOWED.get(dtype, _ALLOWED[torch.bfloat16])
        values = (self.spread, self.kl, self.top)
        return all(value <= share * bound for value, bound in zip(values, bounds, strict=True))

    def __str__(self) -> str:
        return f"{self.spread:.2g} of their spread, KL {self.kl:.2g} nats"


def gaps(logits: Tensor, expected: Tensor) -> list[Gap]:
    """One gap per token, for logits (tokens, vocab) each; in float64 on the CPU, as not every device has float64."""
    few = zip(torch.split(logits, _AT_A_TIME), torch.split(expected, _AT_A_TIME), strict=True)
    return [gap for pair in few for gap in _gaps(*pair)]


def _gaps(logits: Tensor, expected: Tensor) -> list[Gap]:
    logits, expected = logits.cpu().double(), expected.cpu().double()
    impossible = torch.isneginf(expected) & torch.isneginf(logits)  # some models mask unused ids
    p, q = expected.log_softmax(-1), logits.log_softmax(-1)
    kl = torch.where(impossible, 0.0, p.exp() * (p - q)).sum(-1).clamp_min(0)
    top = p.amax(-1) - p.gather(1, logits.argmax(-1, keepdim=True)).squeeze(1)
    difference, spread = (torch.where(impossible, 0.0, each) for each in (logits - expected, expected))
    difference, spread = (each - each.mean(-1, keepdim=True) for each in (difference, spread))
    share = difference.square().mean(-1).sqrt() / spread.square().mean(-1).sqrt().clamp_min(1e-6)
    return [Gap(*each) for each in zip(share.tolist(), kl.tolist(), top.tolist(), strict=True)]


@torch.inference_mode()
def probe(forward: ModuleForward) -> ProbeResult:
    """Run a few tokens through the model.

    Raises UnsupportedModelError: it can't take a tree, keeps state outside the cache, is not causal, its logits differ
    from those of its own forward, or a node's logits differ from those of the node's path alone.
    """
    layout = None
    if has_recurrent_layers(forward.model):
        layout = find_layout(forward.model, _text(forward, 0, 8))
        forward.use_layout(layout)
    measured = _use_of_cache(forward)
    forward.decoder_gives_features = measured.decoder_gives_features
    # Activations that are rounded to 8 bits would hide a fault: block weights are multiplied exactly here.
    with _narrow_window(forward), exact_products(forward.model):
        faults, logit_scale = _run_trial(forward, 0)
        for number in range(1, 1 if forward.dtype in _EXACT else _TRIALS):
            if faults:
                again, _ = _run_trial(forward, number)
                faults = {key: gap for key, gap in faults.items() if key in again}
    if faults:
        (kind, _), gap = next(iter(faults.items()))
        raise UnsupportedModelError(_refusal(forward, kind, gap))
    return replace(measured, logit_scale=logit_scale, layout=layout)


def _use_of_cache(forward: ModuleForward) -> ProbeResult:
    """Run two tokens; returns all but the scale of the logits."""
    cache = _new_cache(forward, 1)
    captured: dict[str | int, Tensor] = {}
    tree = DraftTree.chain(torch.zeros(1, 2, dtype=torch.long, device=forward.device))
    cache.begin(2)
    name = type(forward.model).__name__
    try:
        with forward.capture(captured), cache.recurring(tree, False):
            forward.call(tree, cache, forward.arguments(tree, cache))
    except _FAILURES as error:
        raise UnsupportedModelError(
            f"{name} can't take a tree: a two-token forward with a 4-D mask, position_ids and Haast's cache "
            f"failed with {_error_text(error)}; {_uneven_heads(forward) or 'use stock generate'}"
        ) from error
    if len(cache.updated_layers) != forward.storing_layers or "head" not in captured:
        raise UnsupportedModelError(
            f"{name} keeps state outside the KV cache (it stored {len(cache.updated_layers)} of "
            f"{forward.storing_layers} layers there), so rejected tokens can't be removed; use a model whose layers "
            f"are all attention"
        )
    gives_features = "decoder" in captured and torch.equal(captured["decoder"], captured["head"])
    embedding: nn.Module = forward.model.get_input_embeddings()
    widths = embedding(tree.tokens).shape[-1], captured["head"].shape[-1]
    return ProbeResult(gives_features, 1.0, cache.bytes_per_token, widths)


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _uneven_heads(forward: ModuleForward) -> str:
    mesh = mesh_of(forward.model)
    if mesh is None:
        return ""
    heads = getattr(forward.config, "num_key_value_heads", None) or forward.config.num_attention_heads
    if heads % mesh.size() == 0:
        return ""
    return f"its {heads} key heads can't be split over {mesh.size()} processes: start a number that divides {heads}"


@contextmanager
def _narrow_window(forward: ModuleForward) -> Iterator[None]:
    """Set a sliding window, or chunks, longer than the probe's texts to `_WINDOW` inside the block."""
    all_configs: list[Any] = [forward.config, *(getattr(module, "config", None) for module in forward.model.modules())]
    changed = list[tuple[Any, str, int]]()
    for name, window in (("sliding_window", forward.window), ("attention_chunk_size", forward.chunk)):
        if window is not None and window > _WINDOW:
            configs = {id(each): each for each in all_configs if getattr(each, name, None) == window}
            changed += [(config, name, window) for config in configs.values()]
    try:
        for config, name, _ in changed:
            setattr(config, name, _WINDOW)
        yield
    finally:
        for config, name, window in changed:
            setattr(config, name, window)


def _run_trial(forward: ModuleForward, number: int) -> tuple[dict[tuple[str, int], Gap], float]:
    """Compare one text's logits from a chain, a tree and the model's own forward.

    Returns the differences that are too large, by kind and position, and the scale of the logits. Three rows: a text;
    the same text with other tokens off the path; a text with a shorter past.
    """
    past, short_past = _PAST, _SHORT_PAST
    if forward.context_length is not None:
        past = max(1, min(past, forward.context_length - _PATH))
        short_past = min(short_past, past)
    sizes = [past, short_past, _PATH, len(_OFF), len(_OFF), _PATH]
    first, second, path, off, others, tail = torch.split(_text(forward, number, sum(sizes)), sizes)
    filler = tail[: past - short_past]

    rows = torch.stack([first, first, torch.cat([second, filler])])
    live = torch.arange(past, device=rows.device) < torch.tensor([[past], [past], [short_past]], device=rows.device)
    cache = _new_cache(forward, 3)
    prefilled = _forward(forward, DraftTree.chain(rows, live), cache, last_only=True)
    cache.advance([past, past, short_past])
    chain = _forward(forward, DraftTree.chain(path.expand(3, -1)).padded(len(_PARENTS)), cache).cut(
        3, _PATH, copy=False
    )
    nodes = torch.empty(3, len(_PARENTS), dtype=torch.long, device=rows.device)
    nodes[:, list(_ON)] = path
    nodes[:, list(_OFF)] = torch.stack([off, others, off])
    parents = torch.tensor([_PARENTS] * 3, device=rows.device)
    tree = _forward(forward, DraftTree.from_parents(nodes, parents), cache).logits[:, list(_ON)]

    changed = torch.cat([first, path[:1], tail[1:]])
    plain = _stock(forward, torch.stack([torch.cat([first, path]), changed, torch.cat([second, path, filler])]))
    common = past + 1
    own = torch.cat([plain[0, past - 1 :], plain[2, short_past - 1 : short_past + _PATH]])
    haast = torch.cat([prefilled.logits[0], chain.logits[0], prefilled.logits[2], chain.logits[2]])
    compared = {
        "later": (plain[1, :common], plain[0, :common]),
        "own": (haast, own),
        "path": (tree.flatten(0, 1), chain.logits.flatten(0, 1)),
        "off": (tree[1], tree[0]),
    }
    # Recurrent layers compute in float32 in part.
    computed = torch.float32 if forward.recurrence and forward.dtype is torch.float64 else forward.dtype
    bounds = dict.fromkeys(compared, (computed, _SAME_SHAPE))
    # Quantised layers may compute in 16 bits whatever their input's dtype, and the shapes differ here.
    # The same for recurrent layers that compute the text of the model's own forward otherwise than single tokens.
    alike = forward.recurrence is None or forward.recurrence.layout.consistent
    bounds["own"] = (computed if alike and quantisation(forward.model) is None else torch.bfloat16, 1.0)
    all_gaps = {(kind, at): gap for kind, pair in compared.items() for at, gap in enumerate(gaps(*pair))}
    faults = {key: gap for key, gap in all_gaps.items() if not gap.within(*bounds[key[0]])}
    return faults, _logit_scale(forward, chain.features[0], chain.logits[0])


def _text(forward: ModuleForward, number: int, count: int) -> Tensor:
    """The tokens (count,) of trial text `number`. The first ids are special tokens in many vocabularies."""
    begin = 100 + number * count
    return torch.arange(begin, begin + count, device=forward.device) % int(forward.config.vocab_size)


def _stock(forward: ModuleForward, tokens: Tensor) -> Tensor:
    """Logits (rows, tokens, vocab) of the model's own forward over plain texts, as `generate` calls it, uncached.

    Uses transformers' eager attention: every class has it, and only it leaves nothing out (e.g. a soft cap). Raises
    UnsupportedModelError if the forward fails, or if `generate` would pass it something else than the text's tokens.
    """
    model: Any = forward.model
    more: dict[str, Any] = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        more["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens), 1)
    try:
        if not any(isinstance(module, FusedAttention) for module in model.modules()):  # it takes registered ones only
            model.set_attn_implementation("eager")
        prepared = prepared_inputs(model, tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **more)
        # Some keep the last token's logits only (Bamba), or none if that is None (Phi3).
        inputs = {name: each for name, each in prepared.items() if each is not None and name != "logits_to_keep"}
        logits: Tensor = model(**inputs).logits.reshape(*tokens.shape, -1)
    except UnsupportedModelError:
        raise
    except _FAILURES as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be compared with stock: its own forward over {tokens.shape[1]} tokens "
            f"failed with {_error_text(error)}; use stock generate"
        ) from error
    finally:
        choose_attention(model)
    return logits.to(tokens.device)


def _refusal(forward: ModuleForward, kind: str, gap: Gap) -> str:
    """The error message, from the first kind that differs: a model that is not causal fails all later ones too."""
    name, form = type(forward.model).__name__, quantisation(forward.model)
    if kind == "later":
        why = f"{name} is not causal: its logits at a token change with the tokens after it (by {gap})"
        if getattr(forward.config, "is_decoder", None) is not False:
            return f"{why}, so a draft can't be checked in one forward; use a causal LM, or stock generate"
        remedy = "load it with is_decoder=True, if it was trained so, or use stock generate"
        return f"{why}, as is_decoder is False in its configuration; {remedy}"
    what = f"verify a tree: a node's logits are {gap} off those of its path alone"
    why = "it does not use positions or masks as they are passed"
    if kind == "own":
        what = f"be drafted for: with Haast's masks, positions and cache its logits are {gap} off its own forward's"
        why = "it does not use them as they are passed (e.g. takes positions from cache slots)"
        if forward.window is not None:
            why += f" or has no sliding window of {forward.window}, though its configuration sets one"
    if form is not None:
        why = f"its {form} layers give a row other results when other rows are in the batch, or {why}"
    exact = "llm_int8_threshold=0.0 in its BitsAndBytesConfig makes rows independent"
    return f"{name} can't {what}, so {why}; {exact if form == 'bitsandbytes-8bit' else 'use stock generate'}"


def _new_cache(forward: ModuleForward, rows: int) -> KVCache:
    pool = KVPool(rows * 64)
    return forward.new_cache(pool).bind([pool.sequence() for _ in range(rows)])


def _forward(forward: ModuleForward, tree: DraftTree, cache: KVCache, last_only: bool = False) -> TargetOutput:
    cache.begin(tree.nodes)
    try:
        return forward.run(tree, cache, last_only)
    except _FAILURES as error:
        raise UnsupportedModelError(
            f"{type(forward.model).__name__} can't take a tree: a forward over {tree.nodes} nodes after a past of "
            f"{cache.longest} failed with {_error_text(error)}; use stock generate"
        ) from error


def _logit_scale(forward: ModuleForward, features: Tensor, logits: Tensor) -> float:
    """The factor by which a model multiplies its LM head's output (Cohere, Granite)."""
    raw, logits = forward.lm_head(features).cpu().double(), logits.cpu().double()
    cap = getattr(forward.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.atanh((logits / cap).clamp(-0.999, 0.999))
    scale = float((raw * logits).sum() / raw.square().sum().clamp_min(1e-12))
    return 1.0 if abs(scale - 1) < 0.01 or not scale > 0 else scale
