"""Does a model answer for a tree as it should? A few tokens through it tell.

Owns what is found out once, when a model is taken up: whether it keeps its state in our cache, whether the decoder's
output is what the LM head reads, by how much logits are scaled, and whether a node answers as its path alone would.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from haast.cache import TreeCache
from haast.errors import UnsupportedModelError
from haast.forward import ModuleForward, TargetOutput
from haast.placement import mesh_of
from haast.precision import quantisation
from haast.tree import DraftTree

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}  # of logits, relative to the largest; 16-bit: 0.2


def tolerance(dtype: torch.dtype) -> float:
    """How far logits that should be equal may lie apart, relative to the largest."""
    return _TOLERANCE.get(dtype, 0.2)


@dataclass(frozen=True)
class Probed:
    """What a probe found of a model. It holds as long as the model lives, and spares the next `Target` the probe."""

    decoder_gives_features: bool  # the decoder's output is what the LM head reads
    logit_scale: float


@torch.inference_mode()
def probe(forward: ModuleForward) -> Probed:
    """Run a few tokens through the model.

    Raises:
        UnsupportedModelError: the model can't take a tree, keeps state elsewhere, or answers a node otherwise than
            its path alone.
    """
    gives_features = _use_of_cache(forward)
    forward.decoder_gives_features = gives_features
    return Probed(gives_features, _answers_alike(forward))


def _use_of_cache(forward: ModuleForward) -> bool:
    """Two tokens through the model: does it use our cache, and is the decoder's output what the head reads?"""
    cache = forward.new_cache(1)
    captured: dict[str | int, Tensor] = {}
    tree = DraftTree.chain(torch.zeros(1, 2, dtype=torch.long, device=forward.device))
    cache.begin(2)
    name = type(forward.model).__name__
    try:
        with forward.capture(captured):
            arguments = forward.arguments(tree, cache)
            forward.model(input_ids=tree.tokens, **arguments, **forward.storing(cache))
    except (TypeError, KeyError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        raise UnsupportedModelError(
            f"{name} can't take a tree: a two-token forward with a 4-D mask, position_ids and Haast's cache "
            f"failed with {type(error).__name__}: {error}{_uneven(forward)}"
        ) from error
    if len(cache.updated_layers) != forward.depth or "head" not in captured:
        raise UnsupportedModelError(
            f"{name} keeps state outside the KV cache (it stored {len(cache.updated_layers)} of {forward.depth} "
            f"layers there), so rejected tokens can't be removed; use a model whose layers are all attention"
        )
    return "decoder" in captured and torch.equal(captured["decoder"], captured["head"])


def _uneven(forward: ModuleForward) -> str:
    mesh = mesh_of(forward.model)
    heads = getattr(forward.config, "num_key_value_heads", None) or forward.config.num_attention_heads
    if mesh is None or heads % mesh.size() == 0:
        return ""
    return f"; its {heads} key heads can't be cut over {mesh.size()} processes: start as many as divide them"


def _answers_alike(forward: ModuleForward) -> float:
    """Does a node of a tree answer as in a chain of its own path, whatever its slot and its row's neighbour?

    A model that takes positions from slots, or looks through the mask, fails here. Returns the scale of logits.
    """
    vocab, device = int(forward.config.vocab_size), forward.device
    past, path, twin = ([i % vocab for i in tokens] for tokens in ([3, 1, 4, 1, 5], [2, 6, 5], [9, 2]))
    both = torch.tensor([past + path, twin + [0] * 6], device=device)
    live = torch.tensor([[True] * 8, [True] * 2 + [False] * 6], device=device)
    cache = forward.new_cache(2)
    chain = _run(forward, DraftTree.chain(both, live), cache)
    logit_scale = _scale(forward, chain.features[0], chain.logits[0])
    expected = chain.logits[0, 5:].double()  # (3, vocab)
    cache.commit([range(5), range(2)])
    # Slots 0 1 2 3 4 hold the path's nodes at 0, 3 and 4; between them stand a sibling and its child.
    tokens = torch.tensor([[path[0], 0, past[0], path[1], path[2]]] * 2, device=device)
    parents = torch.tensor([[-1, 0, 1, 0, 3]] * 2, device=device)
    found = _run(forward, DraftTree.from_parents(tokens, parents), cache).logits[0, [0, 3, 4]].double()
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not error <= tolerance(forward.dtype) * max(scale, 1e-6):
        form = quantisation(forward.model)
        why = "it takes positions or masks otherwise than given"
        if form is not None:
            why = f"its {form} layers compute a row otherwise beside other rows, or {why}"
        if form == "bitsandbytes-8bit":
            why += "; llm_int8_threshold=0.0 in its BitsAndBytesConfig makes rows independent"
        raise UnsupportedModelError(
            f"{type(forward.model).__name__} can't verify a tree: a node's logits differ by {error:.2g} (of "
            f"{scale:.2g}) from those of its path alone, so {why}"
        )
    return logit_scale


def _run(forward: ModuleForward, tree: DraftTree, cache: TreeCache) -> TargetOutput:
    cache.begin(tree.nodes)
    return forward.run(tree, cache)


def _scale(forward: ModuleForward, features: Tensor, logits: Tensor) -> float:
    """By how much a model multiplies what its LM head gives (Cohere, Granite)."""
    raw, logits = forward.lm_head(features).to(features.device).double(), logits.double()
    cap = getattr(forward.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.atanh((logits / cap).clamp(-0.999, 0.999))
    scale = float((raw * logits).sum() / raw.square().sum().clamp_min(1e-12))
    return 1.0 if abs(scale - 1) < 0.01 or not scale > 0 else scale
