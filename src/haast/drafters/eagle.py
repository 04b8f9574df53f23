"""EAGLE drafting: extrapolate features, draft tokens through the target's frozen embedding and an LM head.

Owns the head's own cache and how a tree grows; `growth` holds what has grown. Sources: EAGLE (arXiv 2401.15077, section
3) for the pairs and the head; EAGLE-2 (arXiv 2406.16858, section 4) for expansion by cumulative probability and
reranking to a budget; EAGLE-3 (arXiv 2503.01840, section 3) for states fused from several layers. Which of both a head
is, the head knows.

    committed pairs   (f_0, e_1) .. (f_{p-1}, e_p)      recomputed from true features at every `observe`
    root              token p, and the last pair's output extrapolates f_p, whose logits are the root's children
    node at depth d   pair (extrapolated f_{p+d-1}, embedding of its token), rotary position p + d - 1
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from haast import native
from haast.cache import TreeCache
from haast.drafters.base import Accepted, Drafter, last_kept, last_tokens
from haast.drafters.draft_lm import checked_vocab, draft_lm_head
from haast.drafters.forwards import Flight, HeadForward
from haast.drafters.growth import Growth, best_places
from haast.drafters.quick import QuickDraft
from haast.drafters.shape import DraftShape, Plan, plan
from haast.drafters.waiting import Waiting
from haast.drafters.ways import Way, Ways, way_for
from haast.drafters.window import DraftWindow
from haast.errors import HeadMismatchError
from haast.heads.checkpoint import Head, check_fits, check_weights
from haast.heads.module import DraftModule
from haast.heads.precision import warn_of_precision
from haast.speed.fusing import fuse_small_modules
from haast.speed.memory import give_back
from haast.speed.packing import PackedLinear, pack_linears
from haast.speed.policy import Pace
from haast.target import Target
from haast.tree import DraftTree

_MOST_WAITING = 128  # positions that a head leaves unobserved while nothing is drafted: bounds their memory


class EagleDrafter(Drafter):
    """Drafts with a `FeatExtrapolator` or an `Eagle3Head`.

    Args:
        target: whose embedding and LM head are borrowed.
        head: a head trained for this target. Its module is taken over: moved to the target's device and dtype, and
            packed where the target is packed.
        shape: chain, static or dynamic tree, and its size.
        window: positions that the head looks back, so that its memory and time do not grow with the text; None is all.

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
        self._target = target
        self._module = module.to(device=target.device, dtype=target.dtype)
        self.target_layers = module.target_layers
        vocab = None if head.draft_vocab is None else checked_vocab(head.draft_vocab, target)
        self._vocab = vocab
        packed = isinstance(target.lm_head, PackedLinear)
        self._embedding = target.borrowed(target.embedding)
        self._lm_head = draft_lm_head(target, self._module, vocab, packed)
        if packed:
            pack_linears(self._module)
            fuse_small_modules(self._module)
            give_back()
        self._native = packed and native.available()
        self._forward = HeadForward(target, self._module, window, self._native)
        self.reshape(shape or DraftShape())
        self._cache: TreeCache | None = None
        self._forget()

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
        linears = [*self._module.modules(), self._lm_head]
        return sum(m.in_features * m.out_features for m in linears if isinstance(m, PackedLinear | nn.Linear))

    def tensors(self) -> dict[str, Tensor]:
        """The head's tensors as they draft, packed where the target is."""
        return dict(self._module.state_dict())

    def reshape(self, shape: DraftShape, pace: Pace | None = None, ways: Ways | None = None) -> None:
        """Draft another shape from the next step on; with a pace, a dynamic tree is as deep and large as pays.

        Args:
            shape: of one row.
            pace: of one row.
            ways: what to draft for several rows; without them any number drafts as one.
        """
        self.shape, self.pace = shape, pace
        self.ways: Ways = {**(ways or {}), 1: Way(shape, pace)}
        self._most = max(self._planned(way.shape).nodes for way in self.ways.values() if way.shape is not None)
        self._way: Way | None = None
        self._use(1)

    def _planned(self, shape: DraftShape) -> Plan:
        return plan(shape, self._target.vocab_size if self._vocab is None else len(self._vocab))

    def _use(self, rows: int) -> bool:
        """Take up the way for so many rows; whether it drafts."""
        way = way_for(self.ways, rows)
        if way is not self._way and way.shape is not None:
            self._plan = fixed = self._planned(way.shape)
            device = self._target.device
            self._frontier = [torch.tensor(level, device=device).unsqueeze(0) for level in fixed.frontier or ()]
            self._keep = None if fixed.keep is None else torch.tensor(fixed.keep, device=device).unsqueeze(0)
            self._quick = QuickDraft.of(self._target, self._module, self._forward.stack, self._lm_head, self._vocab)
            if self._quick is not None and not self._quick.plan(fixed, way.pace):
                self._quick = None
        self._way = way
        return way.shape is not None

    @property
    def nodes(self) -> int:
        """Nodes of every tree; at most so many where a `pace` or `ways` are set."""
        return self._most

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        self._forward.follow_changes()
        if self._forward.stack is None:
            self._quick = None
        longest = max(len(prompt) for prompt in prompts)
        self._cache = self._forward.new_cache(len(prompts), min(longest, self._pairs.reach or longest))
        self._forget()
        self._pairs.start([len(prompt) for prompt in prompts])
        self._first = torch.tensor([prompt[0] for prompt in prompts], device=self._target.device)

    def memory(self) -> object:
        return self._cache

    def recall(self, memory: object, following: Sequence[int]) -> None:
        assert isinstance(memory, TreeCache), "the cache of an earlier run"
        self._pairs.recall(memory, len(following))
        self._cache = memory
        self._first = torch.tensor([following[-1]], device=self._target.device)

    def _forget(self) -> None:
        self._root: Tensor | None = None  # (rows,): the token behind the last position that the head has observed
        self._newest: Tensor | None = None  # (rows,): the root; another one while positions wait to be observed
        self._extrapolated: Tensor | None = None  # (rows, hidden): the state at the root's position
        self._waiting = Waiting()

    def keep(self, order: Sequence[int]) -> None:
        assert self._cache is not None and self._newest is not None, "no row ends before its prompt is observed"
        rows = list(order)
        self._cache.keep(rows)
        self._waiting.keep(rows)
        self._pairs.keep(rows)
        self._newest, self._first = self._newest[rows], self._first[rows]
        self._root = None if self._root is None else self._root[rows]
        self._extrapolated = None if self._extrapolated is None else self._extrapolated[rows]

    @torch.inference_mode()
    def observe(self, accepted: Accepted) -> None:
        self._newest = last_tokens(accepted, self._newest)
        self._waiting.add(accepted)
        if self._use(len(accepted.counts)) or self._waiting.positions >= _MOST_WAITING:
            self._catch_up()

    def _catch_up(self) -> None:
        """Run the head over the positions that wait."""
        accepted, cache = self._waiting.take(), self._cache
        if accepted is None:
            return
        assert cache is not None, "start comes before observe"
        self._pairs.make_room(cache)
        paired = accepted.tokens if self._module.follows_token else self._at(accepted.tokens)
        self._root = last_tokens(accepted, self._root)
        paired, features, counts = self._pairs.needed(cache, paired, accepted.features, accepted.counts)
        pairs = paired.shape[1]
        if not pairs:
            return  # a part of the prompt that lies before the window
        flight = Flight.chain(cache, pairs, paired.device)  # a shorter row's tail is not kept
        cache.begin(pairs)
        output = self._forward.run(cache, self._embedded(paired), self._module.fuse(features), flight)
        cache.commit([range(count) for count in counts])
        self._extrapolated = last_kept(output, counts, self._extrapolated)  # (rows, hidden)
        self._pairs.warn(cache)

    @torch.inference_mode()
    def propose(self) -> DraftTree:
        assert self._newest is not None, "observe the prompt before the first proposal"
        if not self._use(len(self._newest)):
            return DraftTree.roots(self._newest)
        self._catch_up()
        tree = None if self._quick is None else self._propose_quickly()
        return self._grow_tree() if tree is None else tree

    def _grow_tree(self) -> DraftTree:
        grown = self._grow()
        keep, nodes = self._keep, self._plan.nodes
        if keep is None:
            keep = grown.best(nodes - 1, self._pace)
        return grown.tree(keep)

    @property
    def _pace(self) -> Pace | None:
        assert self._way is not None, "reshape takes up a way"
        return self._way.pace

    def _propose_quickly(self) -> DraftTree | None:
        cache, quick, states = self._cache, self._quick, self._extrapolated
        assert cache is not None and quick is not None and states is not None and self._root is not None
        stack = self._forward.stack
        assert stack is not None, "a quick draft runs on a stack"
        cache.begin(quick.room)
        store = cache.storage(stack.kv_heads, stack.head_dim, states.dtype)
        return None if store is None else quick.propose(states, self._root, cache.lengths, cache.begins, store)

    def _grow(self) -> Growth:
        """All candidates of this step, level by level."""
        cache, extrapolated = self._cache, self._extrapolated
        assert cache is not None and self._root is not None and extrapolated is not None
        reached = torch.tensor(cache.reached, device=self._root.device)
        features = extrapolated.unsqueeze(1)  # (rows, 1, hidden)
        grown = Growth(self._root)
        before = self._root.unsqueeze(1)  # (rows, 1): the token that each node of the frontier carries
        tokens, scores = self._children(features, before, grown.root_scores())
        index = grown.add(tokens, scores, parents=None)
        flight = Flight.chain(cache, 0, self._root.device)
        for level, width in enumerate(self._plan.widths):
            chosen = self._frontier[level] if self._plan.frontier is not None else best_places(scores, width)
            chosen = chosen.expand(len(scores), -1)  # (rows, width) within this level's candidates
            above = scores.gather(1, chosen)
            if self._pace is not None and self._keep is None and not self._pace.deeper(above):
                break
            parent = chosen // self._plan.top_k
            features = features.gather(1, parent.unsqueeze(2).expand(-1, -1, features.shape[2]))
            picked = tokens.gather(1, chosen)
            paired = picked if self._module.follows_token else before.gather(1, parent)
            flight = flight.below(parent, self._forward.bounded((reached + level).unsqueeze(1).expand_as(chosen)))
            features = self._extend(cache, paired, features, flight)
            frontier, before = index.gather(1, chosen), picked  # candidate numbers and tokens of the frontier
            tokens, scores = self._children(features, before, above)
            index = grown.add(tokens, scores, frontier.repeat_interleave(self._plan.top_k, dim=1))
        for row, length in enumerate(flight.past):
            cache.truncate(row, length)
        return grown

    def _at(self, following: Tensor) -> Tensor:
        """The tokens (rows, n) at the observed positions, given those that follow them."""
        start = self._first if self._root is None else self._root
        return torch.cat([start.unsqueeze(1), following[:, :-1]], dim=1)

    def _children(self, states: Tensor, before: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The `top_k` likeliest next tokens per state: target ids and cumulative log-probabilities, (rows, w * k)."""
        logits = self._lm_head(self._module.lm_input(states, before)).float()  # (rows, w, draft vocabulary)
        if self._native and self._plan.top_k <= native.MOST_TOP:
            best, ids = native.top(logits, self._plan.top_k)
        else:
            best, ids = logits.log_softmax(-1).topk(self._plan.top_k, dim=-1)
            best = best.masked_fill(best.isnan(), -torch.inf)  # a model that says nothing of a token: draft others
        if self._vocab is not None:
            ids = self._vocab[ids]
        return ids.flatten(1), (scores.unsqueeze(2) + best).flatten(1)

    def _extend(self, cache: TreeCache, tokens: Tensor, features: Tensor, flight: Flight) -> Tensor:
        """Run the frontier through the head; its keys and values stay behind the committed ones until `truncate`."""
        rows, width = tokens.shape
        cache.begin(width)
        output = self._forward.run(cache, self._embedded(tokens), features, flight)
        cache.commit([range(width)] * rows)
        return output

    def _embedded(self, tokens: Tensor) -> Tensor:
        embeddings: Tensor = self._embedding(tokens)
        return embeddings.to(tokens.device)
