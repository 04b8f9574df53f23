"""EAGLE drafting: extrapolate features, draft tokens through the target's frozen embedding and an LM head.

Owns the head's keys and values, which lie in the target's blocks, and how a tree grows; `growth` holds what has grown.
Sources: EAGLE (arXiv 2401.15077, section 3) for the pairs and the head; EAGLE-2 (arXiv 2406.16858, section 4) for
expansion by cumulative probability and reranking to a budget; EAGLE-3 (arXiv 2503.01840, section 3) for states fused
from several layers. Which of both a head is, the head knows.

    committed pairs   (f_0, e_1) .. (f_{p-1}, e_p)      recomputed from the true features of what `observe` was told
    root              token p, and the last pair's output extrapolates f_p, whose logits are the root's children
    node at depth d   pair (extrapolated f_{p+d-1}, embedding of its token), rotary position p + d - 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from haast import native
from haast.core import Accepted, Request
from haast.device import to_device, without_autograd
from haast.drafters.base import Drafter, stacked
from haast.drafters.batch_policy import Way, Ways, way_for
from haast.drafters.draft_lm import checked_vocab, draft_lm_head
from haast.drafters.head_check import HeadWatch, causes
from haast.drafters.head_runner import Flight, HeadForward
from haast.drafters.native_draft import QuickDraft
from haast.drafters.tree_builder import Growth, best_places
from haast.drafters.tree_shape import DraftShape, Plan, plan
from haast.drafters.window import DraftWindow
from haast.errors import HeadMismatchError
from haast.heads.checkpoint import Head, check_fits, check_weights
from haast.heads.module import DraftModule
from haast.heads.precision import warn_of_precision
from haast.target.fusing import fuse_small_modules
from haast.target.kv_cache import KVCache
from haast.target.kv_pool import BLOCK
from haast.target.kv_pool import Sequence as KVSequence
from haast.target.memory import give_back
from haast.target.packing import is_packed, linear_sizes, pack_linears
from haast.target.target import Target
from haast.tree import DraftTree
from haast.tuning.policy import CostModel

_MOST_PENDING = 128  # positions that wait for a head while nothing is drafted: bounds their memory
_LEAST_KEPT = 4 * BLOCK  # of them, that a head that begins in the middle of a text has to begin with


@dataclass
class EagleState:
    """What the drafter keeps of one request.

    Attributes:
        kv: the request's blocks.
        observed: pairs that the head has; pair i holds token i + 1 and lies in its slot.
        skipped: pairs, from the first, that the head leaves out: those before its window, or before `begin`.
        begin: block of `kv` in which the head's text begins: 0, or later where it has not followed the text so far.
        root: () int64, the last emitted token.
        before: () int64, the token after the last observed position.
        extrapolated: (hidden,), the head's state after the last pair: it stands at the root.
        pending: what was accepted since, and the request's row in it.
    """

    kv: KVSequence
    observed: int
    skipped: int
    before: Tensor
    root: Tensor | None = None
    extrapolated: Tensor | None = None
    pending: list[tuple[Accepted, int]] = field(default_factory=list)
    waiting: int = 0  # positions that are pending
    begin: int = 0

    @property
    def past(self) -> int:
        """Pairs that the head has of its text."""
        return self.observed - BLOCK * self.begin

    def begin_after(self, pairs: int) -> None:
        """The head's text begins with the first block after so many pairs."""
        self.begin = -(-pairs // BLOCK)
        self.skipped = max(self.skipped, BLOCK * self.begin)

    def forget_oldest(self) -> None:
        """Leave out the oldest of what waits, where more wait than may and enough are left to draft by."""
        while self.waiting > _MOST_PENDING:
            accepted, row = self.pending[0]
            count = len(accepted.said()[row])
            if self.waiting - count < _LEAST_KEPT:
                return
            del self.pending[0]
            self.waiting -= count
            self.observed += count
            self.before = accepted.tokens[row, count - 1].clone() if count else self.before
            self.begin_after(self.observed)

    def note_root(self) -> None:
        """Take the last emitted token from what is pending."""
        for accepted, row in reversed(self.pending):
            if count := len(accepted.said()[row]):
                self.root = accepted.tokens[row, count - 1]
                return


@dataclass(frozen=True)
class _Growing:
    """A shape made ready to draft."""

    plan: Plan
    pace: CostModel | None
    frontier: list[Tensor]  # per level, candidate numbers (1, width), of a fixed tree
    keep: Tensor | None  # (1, nodes - 1), of a fixed tree
    quick: QuickDraft | None


class EagleDrafter(Drafter):
    """Drafts with a `FeatExtrapolator` or an `Eagle3Head`.

    Args:
        target: whose embedding and LM head are borrowed.
        head: a head trained for this target. Its module is taken over: moved to the target's device and dtype, and
            packed where the target is packed.
        shape: chain, static or dynamic tree, and its size.
        window: positions that the head looks back, so that its time does not grow with the text; None is all.

    Raises:
        HeadMismatchError: the head was made for another target.
        ValueError: a window below 1.
    """

    name = "eagle"

    def __init__(self, target: Target, head: Head, shape: DraftShape | None = None, window: int | None = None) -> None:
        module = head.module
        if not isinstance(module, DraftModule):
            raise HeadMismatchError(f"{type(module).__name__} do not draft as EAGLE does: give an EAGLE head")
        check_weights(module)
        check_fits(module.config, target.hidden_size, target.vocab_size, type(target.model).__name__)
        warn_of_precision(head.about, target.precision)
        self._pairs = DraftWindow(window, module.config.num_hidden_layers, head.trained_length)
        self._target, self._built = target, (target.device, target.dtype)
        self._module = module.to(device=target.device, dtype=target.dtype)
        self.target_layers = module.target_layers
        vocab = None if head.draft_vocab is None else checked_vocab(head.draft_vocab, target)
        self._vocab = vocab
        packed = is_packed(target.lm_head)
        self._embedding = self._module.embedding(target.borrowed(target.embedding))
        self._lm_head = draft_lm_head(target, self._module, vocab, packed)
        if packed:
            pack_linears(self._module)
            fuse_small_modules(self._module)
            give_back()
        self._native = packed and native.available()
        self._watch = HeadWatch(head.about, partial(causes, target, module.config, head.about))
        self._forward = HeadForward(target, self._module, window, self._native)
        self._cache: KVCache | None = None
        self.prefix_key = object()
        self.reach = self._pairs.reach
        self.reshape(shape or DraftShape())

    @property
    def device(self) -> torch.device:
        """Where it drafts."""
        return self._target.device

    @property
    def window(self) -> int | None:
        """Positions that the head looks back; None is all."""
        return self._pairs.window

    @property
    def parameters(self) -> int:
        """Weights of the head's linear layers and of the draft's LM head."""
        return linear_sizes([*self._module.modules(), self._lm_head])[1]

    def tensors(self) -> dict[str, Tensor]:
        """The head's tensors as they draft, packed where the target is."""
        return dict(self._module.state_dict())

    def reshape(self, shape: DraftShape, pace: CostModel | None = None, ways: Ways | None = None) -> None:
        """Draft another shape from the next step on; with a pace, a dynamic tree is as deep and large as pays.

        Args:
            shape: of one row.
            pace: of one row; on the CPU only, since it looks at probabilities on the host.
            ways: what to draft for several rows, and for one where they say more of it; without them any number drafts
                as one.
        """
        self.shape, self.pace = shape, pace
        self.ways: Ways = {1: Way(shape, pace), **(ways or {})}
        self._growing: dict[tuple[DraftShape, int], _Growing] = {}
        plans = [self.planned(way.shape) for way in self.ways.values() if way.shape is not None]
        self._most = max(each.nodes for each in plans)
        self.room = max(self._most, *(sum(each.widths) for each in plans)) + self._most

    def planned(self, shape: DraftShape) -> Plan:
        """The index plan of a shape over the draft's vocabulary."""
        return plan(shape, self._target.vocab_size if self._vocab is None else len(self._vocab))

    def _growing_of(self, way: Way, budget: int | None) -> _Growing | None:
        """The way's shape within a budget of nodes, made ready; None where nothing is drafted."""
        shape = way.shape
        if shape is None or (budget is not None and budget < 2):
            return None
        if budget is not None and budget < shape.nodes:
            shape = replace(shape, nodes=budget, depth=min(shape.depth, budget - 1))
        found = self._growing.get((shape, id(way.pace)))
        if found is None:
            fixed, device = self.planned(shape), self._target.device
            pace = way.pace if device.type == "cpu" else None
            frontier = [torch.tensor(level, device=device).unsqueeze(0) for level in fixed.frontier or ()]
            keep = None if fixed.keep is None else torch.tensor(fixed.keep, device=device).unsqueeze(0)
            quick = QuickDraft.of(self._embedding, self._module, self._forward.stack, self._lm_head, self._vocab)
            if quick is not None and not quick.plan(fixed, pace):
                quick = None
            found = self._growing[shape, id(way.pace)] = _Growing(fixed, pace, frontier, keep, quick)
        return found

    @property
    def nodes(self) -> int:
        """Nodes of every tree; at most so many where a `pace` or `ways` are set."""
        return self._most

    @property
    def cache(self) -> KVCache:
        """The head's keys and values in the target's blocks. Made at first use."""
        if self._cache is None or self._cache.pool is not self._target.pool:
            self._cache = self._target.cache.beside(self._module.config.num_hidden_layers, self._target.device)
        return self._cache

    @property
    def caches(self) -> tuple[KVCache, ...]:  # type: ignore[override]  # made at first use
        return (self.cache,)

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> EagleState:
        self._target.check_place(self._built)
        stack = self._forward.stack
        self._forward.refresh()
        if self._forward.stack is not stack:
            self._growing.clear()
        before = torch.tensor(prompt[reused], device=self.device)
        state = EagleState(kv, reused, self._pairs.skipped(len(prompt)), before)
        if kv.headless:
            state.begin_after(reused)
        return state

    def filled(self, state: EagleState, length: int) -> int:
        return length if self._lacks(state) else min(length, state.observed + 1)

    def complete_from(self, state: EagleState) -> int:
        if self._lacks(state):
            return state.kv.length
        return state.skipped + 1 if state.skipped else 0

    def _lacks(self, state: EagleState) -> bool:
        """Whether the text is there for the target alone: the head has not followed it."""
        return bool(state.begin or (self.resting and state.pending))

    @without_autograd
    def observe(self, states: Sequence[EagleState], accepted: Accepted) -> None:
        self._watch.observed(accepted)
        for row, (state, said) in enumerate(zip(states, accepted.said(), strict=True)):
            state.pending.append((accepted, row))
            state.waiting += len(said)
        # What waits is run with the next proposal, but prompts at once: others may begin with the same. Where nothing
        # is going to be drafted, that would be work for nobody.
        if self.resting:
            for state in states:
                state.forget_oldest()
        elif accepted.verdict is None or max(state.waiting for state in states) > _MOST_PENDING:
            self._catch_up(states)

    @without_autograd
    def propose(self, states: Sequence[EagleState], budget: int | None = None) -> DraftTree:
        growing = self._growing_of(way_for(self.ways, len(states)), budget)
        if growing is None:
            for state in states:
                state.note_root()
            self._watch.proposed(1)
            return DraftTree.roots(stacked(states, "root"))
        self._catch_up(states)
        tree = self._draft(states, growing)
        self._watch.proposed(tree.nodes)
        return tree

    def behind(self, requests: Sequence[Request]) -> int:
        """Positions of these requests that wait for the head."""
        return sum(request.draft_state.waiting for request in requests)

    def affords(self, rows: int, nodes: int, extra: int, tokens: float) -> bool:
        """Whether `extra` nodes of every row pay beside `nodes`, if a row is expected to gain `tokens` by them."""
        way = way_for(self.ways, rows)
        return way.shape is not None if way.pace is None else way.pace.affords(nodes, extra, tokens)

    def _catch_up(self, states: Sequence[EagleState]) -> None:
        """Run the head over the positions that wait."""
        if not any(state.pending for state in states):
            return
        tokens, features, counts = _joined(states)
        paired = tokens
        if not self._module.follows_token:
            paired = torch.cat([stacked(states, "before").unsqueeze(1), tokens[:, :-1]], dim=1)
        left = [self._pairs.left_out(s.skipped, s.observed, n) for s, n in zip(states, counts, strict=True)]
        if any(left):
            paired, features = _without(paired, left), _without(features, left)
        kept = [count - out for count, out in zip(counts, left, strict=True)]
        for state, out in zip(states, left, strict=True):
            state.observed += out
        pairs = max(kept)
        if pairs:
            if pairs < paired.shape[1]:
                paired, features = paired[:, :pairs], features[:, :pairs]
            cache, past = self._bound(states)
            flight = Flight.chain(past, to_device(torch.tensor(past), paired.device), pairs)  # a tail is overwritten
            output = self._forward.run(cache, self._embedded(paired), self._module.fuse(features), flight)
            for row, (state, count) in enumerate(zip(states, kept, strict=True)):
                if count:
                    state.observed += count
                    state.extrapolated = output[row, count - 1]
        for state in states:
            state.note_root()
            state.before = state.before if state.root is None else state.root
            state.pending, state.waiting = [], 0
        self._pairs.warn(max(state.past for state in states))

    def _bound(self, states: Sequence[EagleState]) -> tuple[KVCache, list[int]]:
        """The head's keys and values of these requests, and how many pairs of each there are."""
        past = [state.past for state in states]
        return self.cache.bind([state.kv for state in states], past, [state.begin for state in states]), past

    def _draft(self, states: Sequence[EagleState], growing: _Growing) -> DraftTree:
        cache, past = self._bound(states)
        roots, extrapolated = stacked(states, "root"), stacked(states, "extrapolated")
        if growing.quick is not None:
            stack = self._forward.stack
            if stack is not None:
                cache.begin(growing.quick.room)
                store = cache.stores.together(stack.kv_heads, stack.head_dim, extrapolated.dtype)
                if store is not None:
                    return growing.quick.propose(extrapolated, roots, past, cache.tables, store, cache.shift)
        grown = self._grow(growing, cache, past, roots, extrapolated)
        keep = growing.keep
        return grown.tree(grown.best(growing.plan.nodes - 1, growing.pace) if keep is None else keep)

    def _grow(self, growing: _Growing, cache: KVCache, past: list[int], roots: Tensor, extrapolated: Tensor) -> Growth:
        """All candidates of this step, level by level."""
        plan, pace = growing.plan, growing.pace
        committed = to_device(torch.tensor(past), roots.device)
        features = extrapolated.unsqueeze(1)  # (rows, 1, hidden)
        grown = Growth(roots)
        before = roots.unsqueeze(1)  # (rows, 1): the token that each node of the frontier carries
        tokens, scores = self._children(features, before, grown.root_scores(), plan.top_k)
        index = grown.add(tokens, scores, parents=None)
        flight = Flight.chain(past, committed, 0)
        ahead = self._ahead(cache, past, committed, len(plan.widths))
        for level, width in enumerate(plan.widths):
            chosen = growing.frontier[level] if plan.frontier is not None else best_places(scores, width)
            chosen = chosen.expand(len(scores), -1)  # (rows, width) within this level's candidates
            above = scores.gather(1, chosen)
            if pace is not None and growing.keep is None and not pace.deeper(above):
                break
            parent = chosen // plan.top_k
            picked = tokens.gather(1, chosen)
            if ahead is None:
                features = features.gather(1, parent.unsqueeze(2).expand(-1, -1, features.shape[2]))
                paired = picked if self._module.follows_token else before.gather(1, parent)
                positions = self._forward.bounded((committed + level).unsqueeze(1).expand_as(chosen))
                flight = flight.below(parent, positions)
                features = self._forward.run(cache, self._embedded(paired), features, flight)
                cache.advance([width] * len(past))
            else:
                features = ahead[:, level : level + 1].expand(-1, width, -1)
            frontier, before = index.gather(1, chosen), picked  # candidate numbers and tokens of the frontier
            tokens, scores = self._children(features, before, above, plan.top_k)
            index = grown.add(tokens, scores, frontier.repeat_interleave(plan.top_k, dim=1))
        return grown

    def _ahead(self, cache: KVCache, past: list[int], committed: Tensor, levels: int) -> Tensor | None:
        """The states of all levels (rows, levels, hidden), of a head that makes them in one pass (P-EAGLE)."""
        masked = self._module.masked()
        if masked is None or not levels:
            return None
        token, state = masked
        tokens = torch.full((len(past), levels), token, device=committed.device)
        flight = Flight.chain(past, committed, levels)
        flight = replace(flight, positions=self._forward.bounded(flight.positions))
        return self._forward.run(cache, self._embedded(tokens), state.expand(len(past), levels, -1), flight)

    def _children(self, states: Tensor, before: Tensor, scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The `top_k` likeliest next tokens per state: target ids and cumulative log-probabilities, (rows, w * k)."""
        logits = self._lm_head(self._module.lm_input(states, before)).float()  # (rows, w, draft vocabulary)
        if self._native and top_k <= native.MOST_TOP:
            best, ids = native.top(logits, top_k)
        else:
            best, ids = logits.log_softmax(-1).topk(top_k, dim=-1)
            best = best.masked_fill(best.isnan(), -torch.inf)  # a model that says nothing of a token: draft others
        if self._vocab is not None:
            ids = self._vocab[ids]
        return ids.flatten(1), (scores.unsqueeze(2) + best).flatten(1)

    def _embedded(self, tokens: Tensor) -> Tensor:
        embeddings: Tensor = self._embedding(tokens)
        return embeddings.to(tokens.device)


def _joined(states: Sequence[EagleState]) -> tuple[Tensor, Tensor, list[int]]:
    """All that waits: tokens (rows, n), features (rows, n, width), shorter rows padded at the end, and counts."""
    first = states[0].pending[0][0] if states[0].pending else None
    alike = first is not None and len(states) == first.tokens.shape[0]
    if first is not None and alike and all(s.pending == [(first, row)] for row, s in enumerate(states)):
        return first.tokens, first.features, [len(said) for said in first.said()]  # a step, as it was
    parts = [[(each, row, len(each.said()[row])) for each, row in state.pending] for state in states]
    counts = [sum(count for *_, count in part) for part in parts]
    some = next(each for part in parts for each, *_ in part)
    tokens = some.tokens.new_zeros(len(states), max(counts))
    features = some.features.new_zeros(len(states), max(counts), some.features.shape[2])
    for place, part in enumerate(parts):
        at = 0
        for each, row, count in part:
            tokens[place, at : at + count] = each.tokens[row, :count]
            features[place, at : at + count] = each.features[row, :count]
            at += count
    return tokens, features, counts


def _without(values: Tensor, left_out: Sequence[int]) -> Tensor:
    """Each row's values (rows, n, ...) without its first ones; what is missing at the end repeats the last."""
    first = to_device(torch.tensor(left_out), values.device).unsqueeze(1)
    index = (first + torch.arange(values.shape[1], device=values.device)).clamp_max(values.shape[1] - 1)
    return values.gather(1, index.view(*index.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:]))
