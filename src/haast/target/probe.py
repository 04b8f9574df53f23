"""Does a model answer for a tree as it answers a plain text by itself? A few tokens through it tell, once.

Found out: whether it keeps its state in our cache, whether the decoder's output is what the LM head reads, by how much
logits are scaled, and whether it may be drafted for at all: it must be causal, must say with Haast's masks, positions
and cache what its own forward says, and must answer a node of a tree as that node's path alone.

The probe's texts are ten tokens long, so a sliding window is narrowed to `_WINDOW` while it lasts: the masks are made
from the configuration in each forward, by transformers as by Haast, and of the same code for every size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from haast.errors import UnsupportedModelError
from haast.target.device_map import mesh_of
from haast.target.fusing import FusedAttention
from haast.target.hf import ModuleForward, TargetOutput
from haast.target.kv_cache import KVCache
from haast.target.kv_pool import KVPool
from haast.target.precision import quantisation
from haast.target.support import choose_attention, prepared_inputs
from haast.tree import DraftTree

# What rounding may do to logits that should be equal, as `Gap` measures it: spread, KL, top. Over the models that
# tests/zoo.py takes up, and SmolLM2-135M, it did at most: 6e-6, 7e-11 and 0 in float32; 0.06, 0.004 and 0 in bfloat16;
# 0.011, 2e-4 and 0 in float16, the best of three texts. A mask that shows a node its neighbour, hides a token, or has a
# window too wide by one, or positions by slot, did 0.04 or more to the spread (tests/test_probe.py), to SmolLM2's 0.2.
_ALLOWED = {
    torch.float64: (1e-5, 1e-9, 1e-4),
    torch.float32: (1e-3, 1e-5, 1e-2),  # some GPUs multiply float32 with ten bits
    torch.float16: (0.02, 2e-3, 0.1),
    torch.bfloat16: (0.1, 0.03, 0.4),
}
_EXACT = (torch.float64, torch.float32)
_SAME_SHAPE = 0.2  # of that, between two forwards of one shape that should do the very same
_TRIALS = 3  # texts for 16 bits, where a router near a tie may send a token elsewhere; a fault shows in all of them
_WINDOW = 4
_PAST, _TWIN, _PATH = 6, 3, 4  # tokens of the committed past, of the ragged row's, and of the path after it
# The path's nodes stand at `_ON`; a branch of two nodes leaves it after the first one, a leaf beside the last one.
_PARENTS = (-1, 0, 1, 0, 3, 4, 4)
_ON = (0, 3, 4, 6)
_OFF = (1, 2, 5)
# What a model raises that is given what it does not expect. Its own asserts are among them.
_FAILURES = (TypeError, LookupError, AttributeError, RuntimeError, ValueError, AssertionError, ArithmeticError)


def tolerance(dtype: torch.dtype) -> float:
    """How far logits that should be equal may lie apart, relative to the largest."""
    return _ALLOWED[dtype][0] if dtype in _EXACT else 0.2


@dataclass(frozen=True)
class Probed:
    """What a probe found of a model. It holds as long as the model lives, and spares the next `Target` the probe."""

    decoder_gives_features: bool  # the decoder's output is what the LM head reads
    logit_scale: float
    kv_bytes_per_token: int = 0  # keys and values of one token, in the model's own dtypes


@dataclass(frozen=True)
class Gap:
    """How far the logits at one token lie from what they should be."""

    spread: float  # root mean square of the difference over that of the logits, both about their mean
    kl: float  # nats from the expected distribution
    top: float  # nats by which the token on top was expected to be less likely than the most likely one

    def within(self, dtype: torch.dtype, share: float = 1.0) -> bool:
        """Whether rounding in this dtype, or a share of it, may be all. NaN is not within anything."""
        most = _ALLOWED.get(dtype, _ALLOWED[torch.bfloat16])
        return all(value <= share * bound for value, bound in zip((self.spread, self.kl, self.top), most, strict=True))

    def __str__(self) -> str:
        return f"{self.spread:.2g} of their spread, KL {self.kl:.2g} nats"


def gaps(found: Tensor, expected: Tensor) -> list[Gap]:
    """One gap per token, of logits (tokens, vocab) each; computed in float64 on the CPU, which all devices reach."""
    found, expected = found.cpu().double(), expected.cpu().double()
    shut = torch.isneginf(expected) & torch.isneginf(found)  # ids that no token has, in some models
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    kl = torch.where(shut, 0.0, p.exp() * (p - q)).sum(-1).clamp_min(0)
    top = p.amax(-1) - p.gather(1, found.argmax(-1, keepdim=True)).squeeze(1)
    apart, spread = (torch.where(shut, 0.0, each) for each in (found - expected, expected))
    apart, spread = (each - each.mean(-1, keepdim=True) for each in (apart, spread))
    share = apart.square().mean(-1).sqrt() / spread.square().mean(-1).sqrt().clamp_min(1e-6)
    return [Gap(*each) for each in zip(share.tolist(), kl.tolist(), top.tolist(), strict=True)]


@torch.inference_mode()
def probe(forward: ModuleForward) -> Probed:
    """Run a few tokens through the model.

    Raises UnsupportedModelError: it can't take a tree, keeps state elsewhere, is not causal, or answers otherwise than
    its own forward, or a node otherwise than its path alone.
    """
    gives_features, size = _use_of_cache(forward)
    forward.decoder_gives_features = gives_features
    with _narrowed(forward):
        faults, logit_scale = _trial(forward, 0)
        for number in range(1, 1 if forward.dtype in _EXACT else _TRIALS):
            if faults:
                again, _ = _trial(forward, number)
                faults = {place: gap for place, gap in faults.items() if place in again}
    if faults:
        (kind, _), gap = next(iter(faults.items()))
        raise UnsupportedModelError(_reason(forward, kind, gap))
    return Probed(gives_features, logit_scale, size)


def _use_of_cache(forward: ModuleForward) -> tuple[bool, int]:
    """Two tokens through the model: is the decoder's output what the head reads? And bytes per token in our cache."""
    cache = _cache(forward, 1)
    captured: dict[str | int, Tensor] = {}
    tree = DraftTree.chain(torch.zeros(1, 2, dtype=torch.long, device=forward.device))
    cache.begin(2)
    name = type(forward.model).__name__
    try:
        with forward.capture(captured):
            arguments = forward.arguments(tree, cache)
            forward.model(input_ids=tree.tokens, **arguments, **forward.storing(cache))
    except _FAILURES as error:
        raise UnsupportedModelError(
            f"{name} can't take a tree: a two-token forward with a 4-D mask, position_ids and Haast's cache "
            f"failed with {_told(error)}; {_uneven(forward) or 'use stock generate'}"
        ) from error
    if len(cache.updated_layers) != forward.depth or "head" not in captured:
        raise UnsupportedModelError(
            f"{name} keeps state outside the KV cache (it stored {len(cache.updated_layers)} of {forward.depth} "
            f"layers there), so rejected tokens can't be removed; use a model whose layers are all attention"
        )
    gives = "decoder" in captured and torch.equal(captured["decoder"], captured["head"])
    return gives, cache.bytes_per_token


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _uneven(forward: ModuleForward) -> str:
    mesh = mesh_of(forward.model)
    heads = getattr(forward.config, "num_key_value_heads", None) or forward.config.num_attention_heads
    if mesh is None or heads % mesh.size() == 0:
        return ""
    return f"its {heads} key heads can't be cut over {mesh.size()} processes: start as many as divide them"


@contextmanager
def _narrowed(forward: ModuleForward) -> Iterator[None]:
    """The model with a sliding window that the probe's texts outgrow, where its configuration has a wider one."""
    window = forward.window
    every: list[Any] = [forward.config, *(getattr(module, "config", None) for module in forward.model.modules())]
    wide = window is not None and window > _WINDOW
    configs = {id(each): each for each in every if wide and getattr(each, "sliding_window", None) == window}
    try:
        for config in configs.values():
            config.sliding_window = _WINDOW
        yield
    finally:
        for config in configs.values():
            config.sliding_window = window


def _trial(forward: ModuleForward, number: int) -> tuple[dict[tuple[str, int], Gap], float]:
    """One text through the model in every way. Returns what differs too much, by kind and place, and the logits' scale.

    Three rows: a text; the same with other tokens off the path; a text with a shorter past.
    """
    past, twin = _PAST, _TWIN
    if forward.context_length is not None:
        past = max(1, min(past, forward.context_length - _PATH))
        twin = min(twin, past)
    sizes = [past, twin, _PATH, len(_OFF), len(_OFF), _PATH]
    begin, count = 100 + number * sum(sizes), sum(sizes)  # the first ids are special tokens in many vocabularies
    words = torch.arange(begin, begin + count, device=forward.device) % int(forward.config.vocab_size)
    first, second, path, off, others, tail = torch.split(words, sizes)
    filler = tail[: past - twin]

    rows = torch.stack([first, first, torch.cat([second, filler])])
    live = torch.arange(past, device=rows.device) < torch.tensor([[past], [past], [twin]], device=rows.device)
    cache = _cache(forward, 3)
    prefilled = _run(forward, DraftTree.chain(rows, live), cache, last_only=True)
    cache.advance([past, past, twin])
    chain = _run(forward, DraftTree.chain(path.expand(3, -1)).padded(len(_PARENTS)), cache).cut(3, _PATH, own=False)
    nodes = torch.empty(3, len(_PARENTS), dtype=torch.long, device=rows.device)
    nodes[:, list(_ON)] = path
    nodes[:, list(_OFF)] = torch.stack([off, others, off])
    parents = torch.tensor([_PARENTS] * 3, device=rows.device)
    tree = _run(forward, DraftTree.from_parents(nodes, parents), cache).logits[:, list(_ON)]

    changed = torch.cat([first, path[:1], tail[1:]])
    plain = _stock(forward, torch.stack([torch.cat([first, path]), changed, torch.cat([second, path, filler])]))
    before = past + 1
    own = torch.cat([plain[0, past - 1 :], plain[2, twin - 1 : twin + _PATH]])
    mine = torch.cat([prefilled.logits[0], chain.logits[0], prefilled.logits[2], chain.logits[2]])
    compared = {
        "later": (plain[1, :before], plain[0, :before]),
        "own": (mine, own),
        "path": (tree.flatten(0, 1), chain.logits.flatten(0, 1)),
        "off": (tree[1], tree[0]),
    }
    bounds = dict.fromkeys(compared, (forward.dtype, _SAME_SHAPE))
    # Quantised layers may compute in 16 bits whatever they are given, and here the shapes differ.
    bounds["own"] = (forward.dtype if quantisation(forward.model) is None else torch.bfloat16, 1.0)
    every = {(kind, place): gap for kind, pair in compared.items() for place, gap in enumerate(gaps(*pair))}
    faults = {place: gap for place, gap in every.items() if not gap.within(*bounds[place[0]])}
    return faults, _scale(forward, chain.features[0], chain.logits[0])


def _stock(forward: ModuleForward, tokens: Tensor) -> Tensor:
    """Logits (rows, tokens, vocab) of the model's own forward over plain texts, as `generate` calls it, uncached.

    The attention is transformers' eager one: every class has it, and only it leaves nothing out (a soft cap, say).
    Raises UnsupportedModelError where it fails, or is given something else than the text's tokens.
    """
    model: Any = forward.model
    more: dict[str, Any] = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        more["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens), 1)
    try:
        if not any(isinstance(module, FusedAttention) for module in model.modules()):  # they know registered ones only
            model.set_attn_implementation("eager")
        prepared = prepared_inputs(model, tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **more)
        given = {each: value for each, value in prepared.items() if value is not None}  # None keeps no logits in Phi3
        logits: Tensor = model(**given).logits.reshape(*tokens.shape, -1)
    except UnsupportedModelError:
        raise
    except _FAILURES as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be compared with stock: its own forward over {tokens.shape[1]} tokens "
            f"failed with {_told(error)}; use stock generate"
        ) from error
    finally:
        choose_attention(model)
    return logits.to(tokens.device)


def _reason(forward: ModuleForward, kind: str, gap: Gap) -> str:
    """Why a model is refused, from what differs first: a model that is not causal fails in all that comes after."""
    name, form = type(forward.model).__name__, quantisation(forward.model)
    if kind == "later":
        why = f"{name} is not causal: what it says at a token changes with the tokens behind it (its logits by {gap})"
        if getattr(forward.config, "is_decoder", None) is not False:
            return f"{why}, so a draft can't be checked in one forward; use a causal LM, or stock generate"
        how = "load it with is_decoder=True, if it was trained so, or use stock generate"
        return f"{why}, as is_decoder is False in its configuration; {how}"
    what = f"verify a tree: a node's logits are {gap} off those of its path alone"
    why = "it takes positions or masks otherwise than given"
    if kind == "own":
        what = f"be drafted for: with Haast's masks, positions and cache its logits are {gap} off its own forward's"
        why = "it takes them otherwise than given (positions from cache slots, say)"
        if forward.window is not None:
            why += f" or has no sliding window of {forward.window}, as its configuration says"
    if form is not None:
        why = f"its {form} layers compute a row otherwise beside other rows, or {why}"
    exact = "llm_int8_threshold=0.0 in its BitsAndBytesConfig makes rows independent"
    return f"{name} can't {what}, so {why}; {exact if form == 'bitsandbytes-8bit' else 'use stock generate'}"


def _cache(forward: ModuleForward, rows: int) -> KVCache:
    pool = KVPool(rows * 64)
    return forward.new_cache(pool).bind([pool.sequence() for _ in range(rows)])


def _run(forward: ModuleForward, tree: DraftTree, cache: KVCache, last_only: bool = False) -> TargetOutput:
    cache.begin(tree.nodes)
    return forward.run(tree, cache, last_only)


def _scale(forward: ModuleForward, features: Tensor, logits: Tensor) -> float:
    """By how much a model multiplies what its LM head gives (Cohere, Granite)."""
    raw, logits = forward.lm_head(features).cpu().double(), logits.cpu().double()
    cap = getattr(forward.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.atanh((logits / cap).clamp(-0.999, 0.999))
    scale = float((raw * logits).sum() / raw.square().sum().clamp_min(1e-12))
    return 1.0 if abs(scale - 1) < 0.01 or not scale > 0 else scale
