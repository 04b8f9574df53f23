"""What block heads of DFlash's and DSpark's kind compute, written out position by position, in fp64.

Reads the tensors under their trainers' names. Knows nothing of `haast.heads` and `haast.drafters`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


@dataclass(frozen=True)
class Reference:
    """A head's tensors (DeepSpec's names), and what a config.json says of it.

    `embeddings` and `lm_head` are (V, hidden) and (drafted, hidden); `mask` is (hidden,), the mask's embedding.
    """

    weights: dict[str, Tensor]
    embeddings: Tensor
    lm_head: Tensor
    mask: Tensor
    heads: int
    kv_heads: int
    eps: float
    theta: float
    block_size: int
    from_anchor: bool = True
    causal: bool = False
    drafted: tuple[int, ...] | None = None  # target ids of the LM head's rows

    @property
    def depths(self) -> int:
        return self.block_size if self.from_anchor else self.block_size - 1

    def rms(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean() + self.eps).sqrt() * self.weights[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = self.weights[f"{name}.weight"] @ x
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def rotated(self, x: Tensor, position: int) -> Tensor:
        half = len(x) // 2
        angles = position * self.theta ** (-torch.arange(half, dtype=x.dtype) / half)
        first, second = x[:half], x[half:]
        cosine, sine = angles.cos(), angles.sin()
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine])

    def projected(self, x: Tensor, layer: str, part: str, count: int, position: int) -> list[Tensor]:
        """The vectors of `count` attention heads: normed if the layer has such norms; values are not rotated."""
        split = list(self.linear(x, f"{layer}.self_attn.{part}_proj").chunk(count))
        if part == "v":
            return split
        norm = f"{layer}.self_attn.{part}_norm"
        if f"{norm}.weight" in self.weights:
            split = [self.rms(each, norm) for each in split]
        return [self.rotated(each, position) for each in split]

    def states(self, captured: Tensor, anchor: int) -> list[Tensor]:
        """Normed states of the slots that draft; `captured` (n, width) are the target's states before the anchor."""
        context = [self.rms(self.linear(each, "fc"), "hidden_norm") for each in captured]
        start, block = len(context), [self.embeddings[anchor], *[self.mask] * (self.block_size - 1)]
        number = 0
        while f"layers.{number}.input_layernorm.weight" in self.weights:
            block = self.layer(f"layers.{number}", context, block, start)
            number += 1
        return [self.rms(each, "norm") for each in block][self.block_size - self.depths :]

    def layer(self, name: str, context: list[Tensor], block: list[Tensor], start: int) -> list[Tensor]:
        normed = [self.rms(each, f"{name}.input_layernorm") for each in block]
        sources = list(enumerate([*context, *normed]))
        keys = [self.projected(x, name, "k", self.kv_heads, position) for position, x in sources]
        values = [self.projected(x, name, "v", self.kv_heads, position) for position, x in sources]
        following = []
        for slot, (x, residual) in enumerate(zip(normed, block, strict=True)):
            seen = start + (slot + 1 if self.causal else len(block))
            outputs = []
            for head, query in enumerate(self.projected(x, name, "q", self.heads, start + slot)):
                shared = head // (self.heads // self.kv_heads)
                scores = torch.stack([query @ keys[j][shared] for j in range(seen)]) / math.sqrt(len(query))
                outputs.append(sum(p * values[j][shared] for j, p in enumerate(scores.softmax(0))))
            residual = residual + self.linear(torch.cat(outputs), f"{name}.self_attn.o_proj")
            inner = self.rms(residual, f"{name}.post_attention_layernorm")
            gated = silu(self.linear(inner, f"{name}.mlp.gate_proj")) * self.linear(inner, f"{name}.mlp.up_proj")
            following.append(residual + self.linear(gated, f"{name}.mlp.down_proj"))
        return following

    def children(self, state: Tensor, before: int) -> Tensor:
        """Log-probabilities (drafted,) after the token `before`, times the confidence."""
        logits, extra = self.lm_head @ state, Tensor()
        if "markov_head.markov_w1.weight" in self.weights:
            extra = token = self.weights["markov_head.markov_w1.weight"][before]
            if "markov_head.gate_proj.weight" in self.weights:
                token = self.linear(torch.cat([state, token]), "markov_head.gate_proj").sigmoid() * token
            logits = logits + self.weights["markov_head.markov_w2.weight"] @ token
        scores = logits.log_softmax(0)
        if "confidence_head.proj.weight" in self.weights:
            width = self.weights["confidence_head.proj.weight"].shape[1]
            read = state if width == len(state) else torch.cat([state, extra])
            scores = scores + self.linear(read, "confidence_head.proj").sigmoid().log()
        return scores

    def tree(self, captured: Tensor, anchor: int, depth: int, top_k: int, width: int, nodes: int) -> set[Any]:
        """The paths (token ids below the root) of a dynamic tree: EAGLE-2's expansion and its choice of the best."""
        states = self.states(captured, anchor)
        level: dict[tuple[int, ...], float] = {(): 0.0}
        every: dict[tuple[int, ...], float] = {}
        for state in states[:depth]:
            expanded = sorted(level, key=lambda path: -level[path])[:width]
            level = {
                (*path, int(rank) if self.drafted is None else self.drafted[rank]): score + level[path]
                for path in expanded
                for score, rank in zip(*(each.tolist() for each in self.best(state, path, anchor, top_k)), strict=True)
            }
            every |= level
        return set(sorted(every, key=lambda path: -every[path])[: nodes - 1])

    def best(self, state: Tensor, path: tuple[int, ...], anchor: int, top_k: int) -> Any:
        return self.children(state, path[-1] if path else anchor).topk(top_k)


def captured_states(model: Any, tokens: list[int], layers: tuple[int, ...]) -> Tensor:
    """The target's states (n, layers * hidden) after these layers, by transformers' own forward."""
    with torch.no_grad():
        hidden = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([hidden[layer][0] for layer in layers], dim=-1)
