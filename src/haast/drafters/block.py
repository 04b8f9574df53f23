"""Block drafting: one pass of a `BlockHead` gives the states of all depths, and any tree is grown from them.

Owns the pass, the head's context in its KV cache, and the growth of the tree. Sources: DSpark (arXiv 2607.05147) for
the head; PCTree (arXiv 2608.02123) for children that depend on their real parent.

    committed      c_0 .. c_{p-1}       the context's keys and values, written once; the block attends to all of them
    block          root at p, masks     one pass; its keys and values are overwritten by the next one
    depth d        state h_d            trunk logits, once per depth
    children       of a node at depth d - 1: trunk logits of depth d + Markov bias of the node's own token
    score          log-probabilities along the path, plus the logarithm of the confidence at each depth

So a level costs a product of the Markov head's rank and the draft vocabulary per expanded node, and no forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from haast.device import to_device
from haast.drafters.batch_policy import DraftConfigs
from haast.drafters.draft_lm import draft_form, frozen_linear
from haast.drafters.eagle import EagleDrafter
from haast.drafters.head_runner import Flight
from haast.drafters.prepared import Prepared
from haast.drafters.tree_builder import Growth
from haast.drafters.tree_shape import DraftShape, Plan
from haast.errors import HeadMismatchError
from haast.heads.block import BlockHead
from haast.heads.checkpoint import AnyModule, Head
from haast.target.kv_cache import KVCache
from haast.target.packing import is_packed
from haast.target.target import Target
from haast.tuning.policy import CostModel


class BlockDrafter(EagleDrafter):
    """Drafts with a `BlockHead`. Requests, pending features, KV cache, shapes and costs are as for `EagleDrafter`.

    Args:
        target, head, shape, window: as for `EagleDrafter`. A shape is cut to the head's depths.
        conditioned: whether a node's children depend on its own token; False gives all nodes of a depth the children
            of the likeliest path, for comparison.

    Raises HeadMismatchError and ValueError as `EagleDrafter` does.
    """

    name = "block"

    def __init__(
        self,
        target: Target,
        head: Head,
        shape: DraftShape | None = None,
        window: int | None = None,
        *,
        conditioned: bool = True,
    ) -> None:
        self._head = self._checked(head.module)
        weight, bias = self._head.context_weights()  # before the head is packed
        super().__init__(target, head, shape, window)
        weight = weight.detach().to(target.device, target.dtype)
        bias = None if bias is None else bias.detach().to(weight)
        self._context = frozen_linear(weight, bias, draft_form(target) if is_packed(target.lm_head) else None)
        self._conditioned = conditioned

    @staticmethod
    def _checked(module: AnyModule) -> BlockHead:
        if not isinstance(module, BlockHead):
            raise HeadMismatchError(f"{type(module).__name__} can't draft a block: give a block head")
        return module

    @property
    def depths(self) -> int:
        """Depth of the deepest tree."""
        return self._head.config.depths

    def reshape(self, shape: DraftShape, pace: CostModel | None = None, configs: DraftConfigs | None = None) -> None:
        super().reshape(replace(shape, depth=min(shape.depth, self.depths)), pace, configs)
        self.room = max(self.room, self._head.config.block_size + self._max_nodes)

    def suited(self, shape: DraftShape) -> DraftShape:
        """A dynamic shape as deep as the block, since a further level costs no forward."""
        return replace(shape, depth=min(self.depths, shape.nodes - 1)) if shape.kind == "dynamic" else shape

    def planned(self, shape: DraftShape) -> Plan:
        return super().planned(replace(shape, depth=min(shape.depth, self.depths)))

    def _commit(
        self, cache: KVCache, past: list[int], tokens: Tensor, features: Tensor, before: Sequence[Tensor | None]
    ) -> Tensor:
        states, positions = self._head.fuse(features), self._following(past, tokens).positions
        cache.begin(tokens.shape[1])
        for layer, (keys, values) in enumerate(self._head.context_keys(self._context(states), positions)):
            cache.write(keys, values, layer)
        return states

    def _grow(
        self,
        prepared: Prepared,
        cache: KVCache,
        past: list[int],
        roots: Tensor,
        extrapolated: Tensor,
        setting: Sequence[tuple[float, float]],
    ) -> Growth:
        plan = prepared.plan
        hidden, trunk = self._block_pass(cache, past, roots, len(plan.widths) + 1)
        grown, before = Growth(roots), roots.unsqueeze(1)
        tokens, scores = self._branches(hidden[:, :1], trunk[:, :1], before, grown.root_scores(), plan.top_k)
        index = grown.add(tokens, scores, parents=None)
        for level in range(len(plan.widths)):
            expanded = prepared.expanded(level, scores, self.curves, setting)
            if expanded is None:
                break
            chosen, above = expanded
            before = tokens.gather(1, chosen) if self._conditioned else self._likeliest(tokens, scores, chosen)
            depth = slice(level + 1, level + 2)
            frontier = index.gather(1, chosen)
            tokens, scores = self._branches(hidden[:, depth], trunk[:, depth], before, above, plan.top_k)
            index = grown.add(tokens, scores, frontier.repeat_interleave(plan.top_k, dim=1))
        grown.calibrate(self.curves, setting)
        return grown

    def _block_pass(self, cache: KVCache, past: list[int], roots: Tensor, depths: int) -> tuple[Tensor, Tensor]:
        """Normed states (rows, depths, hidden), and logits without Markov bias (rows, depths, draft vocabulary)."""
        config = self._head.config
        flight = Flight.chain(past, to_device(torch.tensor(past), roots.device), config.block_size)
        seen = self._head.seen(roots.device).expand(len(past), -1, -1)
        flight = replace(flight, seen=seen, positions=self._forward.bounded(flight.positions))
        block = self._head.block(self._embedded, roots)
        output = self._forward.run(cache, block, block, flight)
        first = config.block_size - config.depths
        hidden = self._head.normed(output[:, first : first + depths])
        return hidden, self._lm_head(hidden).float()

    def _branches(
        self, hidden: Tensor, trunk: Tensor, before: Tensor, scores: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """The `top_k` likeliest children of each node of a level: target ids and scores, (rows, w * k) each.

        Args:
            hidden, trunk: (rows, 1, hidden) and (rows, 1, draft vocabulary) of the children's depth.
            before, scores: (rows, w), the nodes' tokens and scores.
        """
        hidden = hidden.expand(-1, before.shape[1], -1)
        bias = self._head.markov_bias(hidden, before)
        best, ids = self._top(trunk if bias is None else trunk + bias.float(), top_k)
        confidence = self._head.log_confidence(hidden, before)
        above = scores if confidence is None else scores + confidence
        ids = ids.expand(*before.shape, top_k)
        return ids.flatten(1), (above.unsqueeze(2) + best).flatten(1)

    def _likeliest(self, tokens: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        """The token of the best candidate, for every chosen one."""
        best = scores.argmax(1, keepdim=True)
        return tokens.gather(1, best).expand_as(chosen)
