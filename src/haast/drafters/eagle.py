"""EAGLE drafting: extrapolates features and drafts tokens with the target's frozen embedding and an LM head.

Owns the head's KV cache, in the target's blocks, and the expansion of the tree level by level (`tree_builder` keeps the
candidates). Sources: EAGLE (arXiv 2401.15077, section 3) for the pairs and the head; EAGLE-2 (arXiv 2406.16858, section
4) for expansion by cumulative probability and reranking to a budget; EAGLE-3 (arXiv 2503.01840, section 3) for states
fused from several layers. The head's module decides between EAGLE and EAGLE-3.

    committed pairs   (f_0, e_1) .. (f_{p-1}, e_p)      recomputed from the target features given to `observe`
    root              token p, and the last pair's output extrapolates f_p, whose logits are the root's children
    node at depth d   pair (extrapolated f_{p+d-1}, embedding of its token), rotary position p + d - 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from haast import native
from haast.core import Accepted, TokenChooser
from haast.device import to_device, without_autograd
from haast.drafters.base import Drafter, stacked
from haast.drafters.batch_policy import DraftConfig, DraftConfigs, config_for
from haast.drafters.candidates import CandidateRows, Candidates
from haast.drafters.draft_lm import checked_vocab, draft_form, draft_lm_head
from haast.drafters.head_check import HeadWatch, causes
from haast.drafters.head_runner import Flight, HeadForward
from haast.drafters.native_draft import NativeDraft
from haast.drafters.pending_features import MAX_PENDING, EagleState, drop_first, join_pending, remember
from haast.drafters.prepared import Prepared
from haast.drafters.text_vocab import TextVocab
from haast.drafters.tree_builder import Growth
from haast.drafters.tree_shape import DraftShape, Plan, plan
from haast.drafters.window import DraftWindow
from haast.errors import HeadMismatchError
from haast.heads.acceptance import Acceptance
from haast.heads.block import BlockHead
from haast.heads.checkpoint import AnyModule, Head, check_fits, check_layers, check_weights, check_widths
from haast.heads.module import DraftModule
from haast.heads.precision import warn_of_precision
from haast.sampling import Sampler
from haast.target.fusing import fuse_small_modules
from haast.target.kv_cache import KVCache
from haast.target.kv_pool import Sequence as KVSequence
from haast.target.memory import release_freed_memory
from haast.target.packing import is_packed, linear_sizes, pack_linears
from haast.target.target import Target
from haast.tree import DraftTree
from haast.tuning.policy import CostModel


class EagleDrafter(Drafter):
    """Drafts with a `FeatExtrapolator` or an `Eagle3Head`.

    Args:
        target: its embedding and LM head are shared.
        head: a head trained for this target. Its module is modified: moved to the target's device and dtype, and packed
            if the target is packed.
        shape: chain, static or dynamic tree, and its size.
        window: attention window of the head in positions, so that its time does not grow with the text; None is all.

    Attributes:
        parameters: number of weights of the head's linear layers and of the draft LM head.

    Raises:
        HeadMismatchError: the head was trained for another target.
        ValueError: a window below 1.
    """

    name = "eagle"

    def __init__(self, target: Target, head: Head, shape: DraftShape | None = None, window: int | None = None) -> None:
        module = self._checked(head.module)
        check_weights(module)
        check_fits(module.config, target.hidden_size, target.vocab_size, type(target.model).__name__)
        check_widths(module, *target.probed.widths, type(target.model).__name__)
        check_layers(module, target.layers, type(target.model).__name__)
        warn_of_precision(head.about, target.precision)
        self._pairs = DraftWindow(window, module.config.num_hidden_layers, head.trained_length)
        self._target, self._built = target, (target.device, target.dtype)
        self._module = module.to(device=target.device, dtype=target.dtype)
        self.target_layers = module.target_layers
        vocab = None if head.draft_vocab is None else checked_vocab(head.draft_vocab, target)
        self._vocab = vocab
        self._drafted = target.vocab_size if vocab is None else len(vocab)
        packed = is_packed(target.lm_head)
        self._embedding = self._module.embedding(target.borrowed(target.embedding))
        self._lm_head = draft_lm_head(target, self._module, vocab, packed)
        self._text_vocab = TextVocab.of(target, self._module, vocab, self._lm_head)
        if packed:
            pack_linears(self._module, form=draft_form(target))
            fuse_small_modules(self._module)
            release_freed_memory()
        self._native = packed and native.available()
        self.parameters: int = linear_sizes([*self._module.modules(), self._lm_head])[1]
        acceptance = head.acceptance or Acceptance()
        self.curves, self.text_curves = acceptance.head, acceptance.text
        self._watch = HeadWatch(head.about, partial(causes, target, module.config, head.about))
        self._forward = HeadForward(target, self._module, self._embedding, window, self._native)
        self._cache: KVCache | None = None
        self.prefix_key = object()
        self.reach = self._pairs.reach
        self.reshape(shape or DraftShape())

    @staticmethod
    def _checked(module: AnyModule) -> DraftModule:
        """The module, of a kind that this drafter runs. Raises HeadMismatchError."""
        if not isinstance(module, DraftModule) or isinstance(module, BlockHead):
            raise HeadMismatchError(f"{type(module).__name__} can't draft as EAGLE: give an EAGLE head")
        return module

    @property
    def device(self) -> torch.device:
        """The target's device."""
        return self._target.device

    @property
    def window(self) -> int | None:
        """Attention window of the head in positions; None is all."""
        return self._pairs.window

    def tensors(self) -> dict[str, Tensor]:
        """The head's tensors, packed if the target is."""
        return dict(self._module.state_dict())

    def reshape(self, shape: DraftShape, pace: CostModel | None = None, configs: DraftConfigs | None = None) -> None:
        """Change the shape from the next step on; with a pace, each dynamic tree is as deep and large as pays.

        Args:
            shape: for a batch of one row.
            pace: cost model for one row; on the CPU only, since it reads probabilities on the host.
            configs: configuration per batch size; without it, all batch sizes use `shape`.
        """
        self.shape, self.pace = shape, pace
        self.configs: DraftConfigs = {1: DraftConfig(shape, pace), **(configs or {})}
        self._shapes: dict[tuple[DraftShape, int], Prepared] = {}
        plans = [self.planned(config.shape) for config in self.configs.values() if config.shape is not None]
        self._max_nodes = max(each.nodes for each in plans)
        self.room = max(self._max_nodes, *(sum(each.widths) for each in plans)) + self._max_nodes

    def suited(self, shape: DraftShape) -> DraftShape:
        """A default shape, changed to what suits this kind of head."""
        return shape

    def planned(self, shape: DraftShape) -> Plan:
        """The index plan of a shape over the draft vocabulary."""
        return plan(shape, self._drafted)

    def _prepared(self, config: DraftConfig, budget: int | None) -> Prepared | None:
        """The config's shape, cut to a budget of nodes, with its tensors; None if nothing is drafted."""
        shape = config.shape
        if shape is None or (budget is not None and budget < 2):
            return None
        if budget is not None and budget < shape.nodes:
            shape = replace(shape, nodes=budget, depth=min(shape.depth, budget - 1))
        prepared = self._shapes.get((shape, id(config.pace)))
        if prepared is None:
            plan, device = self.planned(shape), self._target.device
            pace = config.pace if device.type == "cpu" else None
            frontier = [torch.tensor(level, device=device).unsqueeze(0) for level in plan.frontier or ()]
            keep = None if plan.keep is None else torch.tensor(plan.keep, device=device).unsqueeze(0)
            one_call = NativeDraft.of(self._forward.native_head, self._lm_head, self._vocab)
            if one_call is not None and not one_call.plan(plan, pace, self.curves):
                one_call = None
            prepared = self._shapes[shape, id(config.pace)] = Prepared(plan, pace, frontier, keep, one_call)
        return prepared

    @property
    def nodes(self) -> int:
        """Nodes of every tree; an upper bound if a `pace` or `configs` are set."""
        return self._max_nodes

    @property
    def cache(self) -> KVCache:
        """The head's KV cache in the target's blocks. Created at first use."""
        if self._cache is None or self._cache.pool is not self._target.pool:
            self._cache = self._target.cache.for_head(self._module.config.num_hidden_layers, self._target.device)
        return self._cache

    @property
    def caches(self) -> tuple[KVCache, ...]:  # type: ignore[override]  # created at first use
        return (self.cache,)

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> EagleState:
        self._target.check_device(self._built)
        head = self._forward.native_head
        self._forward.refresh()
        if self._forward.native_head is not head:  # a weight was changed: modules run from now on
            self._shapes.clear()
        before = torch.tensor(prompt[reused], device=self.device)
        state = EagleState(kv, reused, self._pairs.skipped(len(prompt)), before)
        if kv.headless:
            state.begin_after(reused)
        if self._text_vocab is not None:
            self._text_vocab.note(state.rare, prompt)
        return state

    def filled(self, state: EagleState, length: int) -> int:
        return length if self._incomplete(state) else min(length, state.observed + 1)

    def head_kv_from(self, state: EagleState) -> int:
        if self._incomplete(state):
            return state.kv.length
        return state.skipped + 1 if state.skipped else 0

    def _incomplete(self, state: EagleState) -> bool:
        """Whether the blocks lack the head's keys and values, so that only the target's can be reused."""
        return bool(state.begin or (self.drafting_off and state.pending))

    def set_chooser(self, state: EagleState, chooser: TokenChooser) -> None:
        if isinstance(chooser, Sampler):
            state.temperature = chooser.params.temperature

    @without_autograd
    def observe(self, states: Sequence[EagleState], accepted: Accepted) -> None:
        self._watch.observed(accepted)
        for row, (state, tokens) in enumerate(zip(states, accepted.host_tokens(), strict=True)):
            state.pending.append((accepted, row))
            state.pending_count += len(tokens)
            if accepted.verdict is not None:
                state.count_accepted(tokens)
                if self._text_vocab is not None:
                    self._text_vocab.note(state.rare, tokens)
        # The head processes pending positions at the next proposal; prompts at once, so that other requests can reuse
        # their blocks. Under high load nothing is drafted and the head is not run.
        if self.drafting_off:
            for state in states:
                state.drop_oldest()
        elif accepted.verdict is None or max(state.pending_count for state in states) > MAX_PENDING:
            self._catch_up(states)

    @without_autograd
    def propose(
        self, states: Sequence[EagleState], budget: int | None = None, others: Sequence[Candidates] | None = None
    ) -> DraftTree:
        """See `Drafter.propose`. `others` are drafts of another source, per row: they compete for the tree's nodes."""
        prepared = self._prepared(config_for(self.configs, len(states)), budget)
        if prepared is None:
            for state in states:
                state.update_root()
            self._watch.proposed(1)
            return DraftTree.roots(stacked(states, "root"))
        self._catch_up(states)
        if any(state.extrapolated is None for state in states):  # its first block is still to come
            return DraftTree.roots(stacked(states, "root"))
        if self._text_vocab is not None:
            self._lm_head, self._vocab = self._text_vocab.over([state.rare for state in states])
        tree = self._draft(states, prepared, others if others is not None and any(map(len, others)) else None)
        self._watch.proposed(tree.nodes)
        return tree

    def drafts(self, rows: int, budget: int | None = None) -> bool:
        """Whether it drafts for a batch of `rows` rows."""
        return self._prepared(config_for(self.configs, rows), budget) is not None

    @staticmethod
    def pending_positions(states: Sequence[EagleState]) -> int:
        """Positions of all rows that the head has not processed yet."""
        return sum(state.pending_count for state in states)

    def _catch_up(self, states: Sequence[EagleState]) -> None:
        """Run the head over the pending positions."""
        if not any(state.pending for state in states):
            return
        tokens, features, counts = join_pending(states)
        paired = tokens
        if not self._module.follows_token:
            paired = torch.cat([stacked(states, "before").unsqueeze(1), tokens[:, :-1]], dim=1)
        left_out = [self._pairs.left_out(s.skipped, s.observed, n) for s, n in zip(states, counts, strict=True)]
        if any(left_out):
            paired, features = drop_first(paired, left_out), drop_first(features, left_out)
        kept = [count - out for count, out in zip(counts, left_out, strict=True)]
        for state, out in zip(states, left_out, strict=True):
            state.observed += out
        pairs = max(kept)
        if pairs:
            if pairs < paired.shape[1]:
                paired, features = paired[:, :pairs], features[:, :pairs]
            rows = [row for row, count in enumerate(kept) if count]
            running = [states[row] for row in rows]
            if len(rows) < len(states):  # a text that has not reached its head's first block has no place in it
                paired, features = paired[rows], features[rows]
            cache, past = self._bound(running)
            # The padding of shorter rows is overwritten by later pairs.
            output = self._commit(cache, past, paired, features, [state.extrapolated for state in running])
            for place, (state, row) in enumerate(zip(running, rows, strict=True)):
                state.observed += kept[row]
                state.extrapolated = output[place, kept[row] - 1]
        for state in states:
            state.update_root()
            state.before = state.before if state.root is None else state.root
            state.pending, state.pending_count = [], 0
        self._pairs.warn(max(state.past for state in states))

    def _commit(
        self, cache: KVCache, past: list[int], tokens: Tensor, features: Tensor, before: Sequence[Tensor | None]
    ) -> Tensor:
        """Write keys and values of pairs after the committed ones; returns the head's states (rows, n, hidden).

        Args:
            cache: bound to these rows, which have `past` committed pairs each.
            tokens: (rows, n).
            features: (rows, n, width) of the target.
            before: per row, the head's state after its last committed pair; None if there is none.
        """
        head = self._forward.native_head
        if head is not None:
            cache.begin(tokens.shape[1])
            if (store := self._forward.store(cache, features.dtype)) is not None:
                return head.commit(tokens, features, past, cache.tables, store, cache.shift)
        fused = self._module.continued(self._module.fuse(features), before)
        return self._forward.run(cache, self._embedded(tokens), fused, self._following(past, tokens))

    @staticmethod
    def _following(past: list[int], tokens: Tensor) -> Flight:
        """The flight of pairs after each row's committed ones; `tokens` are theirs, (rows, n)."""
        return Flight.chain(past, to_device(torch.tensor(past), tokens.device), tokens.shape[1])

    def _bound(self, states: Sequence[EagleState]) -> tuple[KVCache, list[int]]:
        """The head's KV cache bound to these requests, and the number of committed pairs of each."""
        past = [state.past for state in states]
        return self.cache.bind([state.kv for state in states], past, [state.begin for state in states]), past

    def _draft(
        self, states: Sequence[EagleState], prepared: Prepared, others: Sequence[Candidates] | None = None
    ) -> DraftTree:
        cache, past = self._bound(states)
        roots, extrapolated = stacked(states, "root"), stacked(states, "extrapolated")
        setting = [(state.warmth, state.correction.shift) for state in states]
        if prepared.one_call is not None:
            cache.begin(prepared.one_call.room)
            if (store := self._forward.store(cache, extrapolated.dtype)) is not None:
                packed = None if others is None else CandidateRows.of(others)
                one_call, place = prepared.one_call, (past, cache.tables, store, cache.shift)
                assert is_packed(self._lm_head), "as it was prepared"
                one_call.draft_over(self._lm_head, self._vocab)
                tree, scores = one_call.propose(extrapolated, roots, *place, others=packed, setting=setting)
                if prepared.pace is not None or others is not None:
                    remember(states, tree, scores)
                return tree
        grown, keep = self._grow(prepared, cache, past, roots, extrapolated, setting), prepared.keep
        if others is not None:
            grown.compete(others, keep)
        if others is not None or keep is None:
            keep = grown.best(prepared.plan.nodes - 1, prepared.pace if prepared.keep is None else None)
        tree = grown.tree(keep)
        # Where probabilities decide on the host, or between sources, they are corrected; on a GPU they stay there.
        if roots.device.type == "cpu" and (prepared.pace is not None or others is not None):
            remember(states, tree, grown.head_scores(keep))
        return tree

    def _grow(
        self,
        prepared: Prepared,
        cache: KVCache,
        past: list[int],
        roots: Tensor,
        extrapolated: Tensor,
        setting: Sequence[tuple[float, float]],
    ) -> Growth:
        """Expand the trees level by level; returns all candidates, with calibrated scores."""
        plan = prepared.plan
        committed = to_device(torch.tensor(past), roots.device)
        features = extrapolated.unsqueeze(1)  # (rows, 1, hidden)
        grown = Growth(roots)
        before = roots.unsqueeze(1)  # (rows, 1): the token that each node of the frontier carries
        tokens, scores = self._children(features, before, grown.root_scores(), plan.top_k)
        index = grown.add(tokens, scores, parents=None)
        flight = Flight.chain(past, committed, 0)
        parallel = self._parallel_states(cache, past, committed, len(plan.widths))
        for level, width in enumerate(plan.widths):
            expanded = prepared.expanded(level, scores, self.curves, setting)
            if expanded is None:
                break
            chosen, above = expanded
            parent = chosen // plan.top_k
            picked = tokens.gather(1, chosen)
            if parallel is None:
                features = features.gather(1, parent.unsqueeze(2).expand(-1, -1, features.shape[2]))
                paired = picked if self._module.follows_token else before.gather(1, parent)
                positions = self._forward.bounded((committed + level).unsqueeze(1).expand_as(chosen))
                flight = flight.below(parent, positions)
                features = self._forward.run(cache, self._embedded(paired), features, flight)
                cache.advance([width] * len(past))
            else:
                features = parallel[:, level : level + 1].expand(-1, width, -1)
            frontier, before = index.gather(1, chosen), picked  # candidate indices and tokens of the frontier
            tokens, scores = self._children(features, before, above, plan.top_k)
            index = grown.add(tokens, scores, frontier.repeat_interleave(plan.top_k, dim=1))
        grown.calibrate(self.curves, setting)
        return grown

    def _parallel_states(self, cache: KVCache, past: list[int], committed: Tensor, levels: int) -> Tensor | None:
        """The states of all levels (rows, levels, hidden) in one forward (P-EAGLE); None for other heads."""
        masked = self._module.masked()
        if masked is None or not levels:
            return None
        token, state = masked
        tokens = torch.full((len(past), levels), token, device=committed.device)
        flight = Flight.chain(past, committed, levels)
        flight = replace(flight, positions=self._forward.bounded(flight.positions))
        return self._forward.run(cache, self._embedded(tokens), state.expand(len(past), levels, -1), flight)

    def _children(self, states: Tensor, before: Tensor, scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The `top_k` most likely tokens per state: target ids and cumulative log-probabilities, (rows, w * k) each."""
        best, ids = self._top(self._lm_head(self._module.lm_input(states, before)).float(), top_k)
        return ids.flatten(1), (scores.unsqueeze(2) + best).flatten(1)

    def _top(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The `top_k` likeliest tokens of logits (rows, w, draft vocabulary): log-probabilities, and target ids."""
        if self._native and top_k <= native.MOST_TOP:
            best, ids = native.top(logits, top_k)
        else:
            best, ids = logits.log_softmax(-1).topk(top_k, dim=-1)
            best = best.masked_fill(best.isnan(), -torch.inf)  # NaN logits: draft other tokens
        return best, ids if self._vocab is None else self._vocab[ids]

    def _embedded(self, tokens: Tensor) -> Tensor:
        embeddings: Tensor = self._embedding(tokens)
        return embeddings.to(tokens.device)
