"""Drafts a chain with a smaller model that has the same tokenizer (Leviathan et al., arXiv 2211.17192).

The small model is a `Target` with a KV pool of its own. It drafts its argmax, or samples from its own distribution and
returns that (`DraftTree.draft_probs`), for the rules of `haast.engine.rules`.

    observe    the text grows; accepted drafts that the small model has computed stay in its cache
    propose    run the positions that the cache lacks, root included, take a token, run that, ...: `depth` forwards

    text    ... r a b x      r a b are computed (r the last root, a b accepted drafts), x is the bonus and the new root
    cache   ... r a b        so the next forward is over x only
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from haast.core import Accepted, SamplingParams, TokenChooser
from haast.device import to_device, without_autograd
from haast.drafters.base import Drafter
from haast.errors import HeadMismatchError, check_at_least
from haast.sampling import DRAFT, Sampler, inverse_cdf, keyed_uniform
from haast.target.kv_pool import PoolFullError
from haast.target.kv_pool import Sequence as KVSequence
from haast.target.target import Target
from haast.tree import DraftTree

_MAX_PENDING = 16  # observed positions that may wait for the next proposal; more are computed at once
_CHUNK = 512  # positions per prefill forward


@dataclass(eq=False)
class SmallModelState:
    """The small model's state of a request. `kv` is None once its blocks were freed: then nothing is drafted."""

    kv: KVSequence | None
    text: list[int] = field(default_factory=list)
    ran: int = 0  # drafts of the last proposal that were computed
    key: tuple[int, int] = (0, 0)  # seed and choice of the draws


class SmallModelDrafter(Drafter):
    """Drafts a chain with a small model.

    Args:
        target: the model that it drafts for.
        small: a smaller model with the same tokenizer. Their embeddings may be padded to different sizes if both
            targets have a tokenizer.
        depth: tokens drafted per step, 1 or more.
        sampling: sample the drafts with these settings (best: the target's) instead of taking the argmax; its
            `processors` are ignored, since they may be stateful. Its seed is used for requests without a seed.

    Raises HeadMismatchError for another vocabulary or device, ValueError for a depth below 1.
    """

    name = "small-model"

    def __init__(self, target: Target, small: Target, depth: int = 4, sampling: SamplingParams | None = None) -> None:
        check_at_least("depth", depth)
        _check_vocabularies(target, small)
        if small.ranks is not None:
            raise HeadMismatchError(
                "the small model is sharded over processes, but only one process drafts: load it unsharded"
            )
        if small.recurrent:
            raise HeadMismatchError(
                f"the small model, {type(small.model).__name__}, has recurrent layers, whose states can't go back to "
                f"the accepted drafts: use a small model with attention layers only"
            )
        if small.device != target.device:
            raise HeadMismatchError(f"the small model is on {small.device}, the target on {target.device}: move one")
        if small is target:  # needs a second cache: the target's own is bound to the batch that it verifies
            small = Target(target.model, target.tokenizer, probed=target.probed)
        self._small, self._depth, self._vocab = small, depth, target.vocab_size
        self._sampler = None if sampling is None else Sampler(replace(sampling, processors=()))
        self._drafting: set[SmallModelState] = set()

    @property
    def nodes(self) -> int:
        return self._depth + 1

    def begin(self, prompt: Sequence[int], kv: KVSequence, reused: int) -> SmallModelState:
        small, text = self._small, list(map(int, prompt[: reused + 1]))
        with small.lock:
            if not self._drafting:
                small.refresh()
            small_kv = small.pool.sequence()
            _, source, copy = small_kv.reuse(text)
            if source:
                small.cache.stores.copy_block(source, copy)
        state = SmallModelState(small_kv, text)
        if self._sampler is not None:
            state.key = (self._sampler.params.seed, 0)
        self._drafting.add(state)
        return state

    def set_chooser(self, state: SmallModelState, chooser: TokenChooser) -> None:
        if isinstance(chooser, Sampler):
            state.key = (chooser.params.seed, chooser.choice)

    def end(self, state: SmallModelState) -> None:
        self._drafting.discard(state)
        self._release(state)

    def observe(self, states: Sequence[SmallModelState], accepted: Accepted) -> None:
        limit = self._small.context_length
        for state, tokens in zip(states, accepted.host_tokens(), strict=True):
            if state.kv is not None and tokens:
                # Keep the slots of accepted drafts, which are part of the text now.
                state.kv.length = min(state.kv.length, len(state.text) + min(len(tokens) - 1, state.ran))
            state.ran = 0
            state.text += tokens
            if limit is not None and len(state.text) > limit:
                self._release(state)
            if state.kv is not None and len(state.text) - state.kv.length > _MAX_PENDING:
                self._catch_up(state)

    @without_autograd
    def propose(self, states: Sequence[SmallModelState], budget: int | None = None) -> DraftTree:
        depth = self._depth if budget is None else min(self._depth, budget - 1)
        rows = [row for row, state in enumerate(states) if depth > 0 and self._has_room(state, depth)]
        roots = to_device(torch.tensor([state.text[-1] for state in states]), self._small.device)
        if not rows:
            return DraftTree.roots(roots)
        drafting = [states[row] for row in rows]
        chain, probs = [roots if len(rows) == len(states) else roots[rows]], list[Tensor]()
        with self._small.lock:
            for level in range(depth):
                logits = self._run(drafting, level, chain[-1])
                if self._sampler is None:
                    chain.append(logits.argmax(-1))
                else:
                    probs.append(self._distributions(self._sampler, drafting, chain[1:], logits))
                    chain.append(self._sample(drafting, level, probs[-1]))
        tokens, live = torch.stack(chain, 1), None
        if len(rows) < len(states):
            drafts, tokens = tokens, roots.unsqueeze(1).repeat(1, depth + 1)
            tokens[rows] = drafts
            live = torch.zeros_like(tokens, dtype=torch.bool)
            live[:, 0] = live[rows] = True
        tree = DraftTree.chain(tokens, live)
        if not probs:
            return tree
        # (rows, nodes, vocab); zeros at roots and dead nodes
        draft_probs = probs[0].new_zeros(len(states), depth + 1, self._vocab)
        draft_probs[rows, 1:] = torch.stack(probs, 1)
        return replace(tree, draft_probs=draft_probs)

    def _has_room(self, state: SmallModelState, depth: int) -> bool:
        """Reserve slots for `depth` drafts; False if the small model's context or pool has no room."""
        limit = self._small.context_length
        if state.kv is None or (limit is not None and len(state.text) + depth - 1 > limit):
            return False
        try:
            with self._small.lock:
                # A batch's first forward is padded to the row with most pending positions, see `_run`.
                state.kv.reserve(len(state.text) + max(depth, _MAX_PENDING + 1))
        except PoolFullError:
            self._release(state)
            return False
        return True

    def _run(self, states: Sequence[SmallModelState], depth: int, newest: Tensor) -> Tensor:
        """Logits (rows, vocab) after the token at `depth`, `newest` (rows,); at depth 0 also run pending positions."""
        kvs, pending = [_kv(state) for state in states], [[0]] * len(states)
        if depth:
            chain = DraftTree.roots(self._clamp_ids(newest))
        else:
            for kv, state in zip(kvs, states, strict=True):
                kv.length = min(kv.length, len(state.text) - 1)
            pending = [state.text[kv.length :] for kv, state in zip(kvs, states, strict=True)]
            chain = self._chain(pending)
        cache = self._small.cache.bind(kvs)
        logits = self._small.forward(chain, cache, last_only=chain.nodes > 1).logits[:, 0, : self._vocab]
        cache.advance([len(each) for each in pending])
        for state in states:
            state.ran = depth
        return logits

    @without_autograd
    def _catch_up(self, state: SmallModelState) -> None:
        """Run the pending positions except the root, in chunks, and publish them for reuse by other requests."""
        small, kv = self._small, _kv(state)
        with small.lock:
            try:
                while chunk := state.text[kv.length : -1][:_CHUNK]:
                    cache = small.cache.bind([kv])
                    small.forward(self._chain([chunk]), cache, last_only=True)
                    cache.advance([len(chunk)])
                kv.publish(state.text, kv.length)
            except PoolFullError:
                self._release(state)

    def _release(self, state: SmallModelState) -> None:
        """Free the blocks; other requests may reuse those of the text."""
        kv, state.kv = state.kv, None
        if kv is not None:
            with self._small.lock:
                kv.release(state.text, min(kv.length, len(state.text)))

    def _chain(self, texts: Sequence[Sequence[int]]) -> DraftTree:
        """One chain per row, padded to the longest."""
        longest, device = max(map(len, texts)), self._small.device
        tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
        live = None
        if any(len(text) < longest for text in texts):
            live = to_device(torch.arange(longest) < torch.tensor([[len(text)] for text in texts]), device)
        return DraftTree.chain(self._clamp_ids(to_device(tokens, device)), live)

    def _distributions(
        self, sampler: Sampler, states: Sequence[SmallModelState], drafted: Sequence[Tensor], logits: Tensor
    ) -> Tensor:
        """The processed distribution (rows, vocab) of each row's next draft, after its text and the drafts so far."""
        texts: list[Sequence[int]] = [state.text for state in states]
        if not sampler.stateless:
            drafts = torch.stack(list(drafted), 1).tolist() if drafted else [[]] * len(states)
            # The penalty can't index ids beyond the small model's vocabulary, which it never drafts.
            size = self._small.vocab_size
            texts = [[t for t in (*text, *more) if t < size] for text, more in zip(texts, drafts, strict=True)]
        probs = [sampler.probs(text, scores) for text, scores in zip(texts, logits, strict=True)]
        return pad(torch.stack(probs), (0, self._vocab - probs[0].shape[0]))

    def _sample(self, states: Sequence[SmallModelState], depth: int, probs: Tensor) -> Tensor:
        """One draft per row, (rows,). Draws are keyed by the root's position, as in `haast.engine.rules`."""
        tokens = [
            inverse_cdf(each, keyed_uniform(*state.key, len(state.text), DRAFT, depth))
            for state, each in zip(states, probs, strict=True)
        ]
        return torch.tensor(tokens, device=probs.device)

    def _clamp_ids(self, tokens: Tensor) -> Tensor:
        """Clamp ids of the target's vocabulary padding to the small model's last id; texts do not contain them."""
        return tokens.clamp_max(self._small.vocab_size - 1)


def _kv(state: SmallModelState) -> KVSequence:
    if state.kv is None:
        raise RuntimeError("the request's blocks in the small model's pool were freed: it can't be drafted for")
    return state.kv


def _check_vocabularies(target: Target, small: Target) -> None:
    """Raise HeadMismatchError if the tokenizers differ; without tokenizers, if the vocabulary sizes do."""
    if target.tokenizer is not None and small.tokenizer is not None:
        if target.tokenizer.get_vocab() != small.tokenizer.get_vocab():
            raise HeadMismatchError(
                "the small model has another tokenizer than the target, so its token ids have other meanings: take a "
                "smaller model with the same tokenizer"
            )
    elif small.vocab_size != target.vocab_size:
        raise HeadMismatchError(
            f"the small model has a vocabulary of {small.vocab_size} tokens, the target one of {target.vocab_size}: "
            "take a smaller model with the same tokenizer (load both with their tokenizers if only the padding differs)"
        )
