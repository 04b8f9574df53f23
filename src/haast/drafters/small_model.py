"""Drafting with a smaller model of the same tokenizer (Leviathan et al., arXiv 2211.17192), as a chain.

The small model is a `Target` like any other, with a KV pool of its own. It drafts its likeliest tokens, or draws them
from its own distribution and says what that was (`DraftTree.draft_probs`), for the rules of `haast.engine.rules`.

    observed   the text grows; accepted drafts that were run already stay in the small model's cache
    propose    run what the cache lacks of the text, root included, take a token, run that, ... depth forwards

    text    ... r a b x      r a b were run (r the last root, a b accepted drafts), x is the bonus and the new root
    cache   ... r a b        so the next forward is over x alone
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

_MOST_WAITING = 16  # positions that wait for the next proposal; more are run when they are observed
_CHUNK = 512  # positions of a forward over a prompt


@dataclass(eq=False)
class SmallModelState:
    """What the small model knows of a request."""

    kv: KVSequence | None
    text: list[int] = field(default_factory=list)
    ran: int = 0
    key: tuple[int, int] = (0, 0)


class SmallModelDrafter(Drafter):
    """A chain of a small model's choices.

    Args:
        target: the model that is drafted for.
        small: a smaller one of the same tokenizer. Their embeddings may be padded to different sizes if both carry it.
        depth: tokens drafted a step, 1 or more.
        sampling: draw the drafts under these settings (the target's own serve best) instead of taking the likeliest;
            without its `processors`, which may count their calls. Its seed serves for requests that have none of their
            own.

    Raises HeadMismatchError for another vocabulary or device, ValueError for a depth below 1.
    """

    name = "small-model"

    def __init__(self, target: Target, small: Target, depth: int = 4, sampling: SamplingParams | None = None) -> None:
        check_at_least("depth", depth)
        _check_vocabularies(target, small)
        if small.ranks is not None:
            raise HeadMismatchError("the small model is sharded over processes, and one process drafts: load it whole")
        if small.device != target.device:
            raise HeadMismatchError(f"the small model is on {small.device}, the target on {target.device}: move one")
        if small is target:  # its cache is bound to what it verifies while drafts are made
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
            own = small.pool.sequence()
            _, source, copy = own.reuse(text)
            if source:
                small.cache.stores.copy_block(source, copy)
        state = SmallModelState(own, text)
        if self._sampler is not None:
            state.key = (self._sampler.params.seed, 0)
        self._drafting.add(state)
        return state

    def drawn_by(self, state: SmallModelState, chooser: TokenChooser) -> None:
        if isinstance(chooser, Sampler):
            state.key = (chooser.params.seed, chooser.choice)

    def end(self, state: SmallModelState) -> None:
        self._drafting.discard(state)
        self._release(state)

    def observe(self, states: Sequence[SmallModelState], accepted: Accepted) -> None:
        limit = self._small.context_length
        for state, said in zip(states, accepted.host_tokens(), strict=True):
            if state.kv is not None and said:
                # Of the chain that was proposed, all accepted nodes are in the text now: their slots are right.
                state.kv.length = min(state.kv.length, len(state.text) + min(len(said) - 1, state.ran))
            state.ran = 0
            state.text += said
            if limit is not None and len(state.text) > limit:
                self._release(state)
            if state.kv is not None and len(state.text) - state.kv.length > _MOST_WAITING:
                self._catch_up(state)

    @without_autograd
    def propose(self, states: Sequence[SmallModelState], budget: int | None = None) -> DraftTree:
        depth = self._depth if budget is None else min(self._depth, budget - 1)
        able = [row for row, state in enumerate(states) if depth > 0 and self._has_room(state, depth)]
        roots = to_device(torch.tensor([state.text[-1] for state in states]), self._small.device)
        if not able:
            return DraftTree.roots(roots)
        drafting = [states[row] for row in able]
        chain, probs = [roots if len(able) == len(states) else roots[able]], list[Tensor]()
        with self._small.lock:
            for level in range(depth):
                logits = self._run(drafting, level, chain[-1])
                if self._sampler is None:
                    chain.append(logits.argmax(-1))
                else:
                    probs.append(self._distributions(self._sampler, drafting, chain[1:], logits))
                    chain.append(self._drawn(drafting, level, probs[-1]))
        tokens, live = torch.stack(chain, 1), None
        if len(able) < len(states):
            drafts, tokens = tokens, roots.unsqueeze(1).repeat(1, depth + 1)
            tokens[able] = drafts
            live = torch.zeros_like(tokens, dtype=torch.bool)
            live[:, 0] = live[able] = True
        tree = DraftTree.chain(tokens, live)
        if not probs:
            return tree
        # (rows, nodes, vocab); zeros where nothing was drawn: at roots and dead nodes
        placed = probs[0].new_zeros(len(states), depth + 1, self._vocab)
        placed[able, 1:] = torch.stack(probs, 1)
        return replace(tree, draft_probs=placed)

    def _has_room(self, state: SmallModelState, depth: int) -> bool:
        """Whether the small model's context and pool have room for so many drafts."""
        limit = self._small.context_length
        if state.kv is None or (limit is not None and len(state.text) + depth - 1 > limit):
            return False
        try:
            with self._small.lock:
                # A batch's first forward is as wide as the row that waits for most, see `_run`.
                state.kv.reserve(len(state.text) + max(depth, _MOST_WAITING + 1))
        except PoolFullError:
            self._release(state)
            return False
        return True

    def _run(self, states: Sequence[SmallModelState], depth: int, newest: Tensor) -> Tensor:
        """The logits (rows, vocab) of what follows the draft at `depth`, `newest` (rows,); at 0 it is the root."""
        kvs, waiting = [_kv(state) for state in states], [[0]] * len(states)
        if depth:
            chain = DraftTree.roots(self._known(newest))
        else:
            for kv, state in zip(kvs, states, strict=True):
                kv.length = min(kv.length, len(state.text) - 1)
            waiting = [state.text[kv.length :] for kv, state in zip(kvs, states, strict=True)]
            chain = self._chain(waiting)
        cache = self._small.cache.bind(kvs)
        logits = self._small.forward(chain, cache, last_only=chain.nodes > 1).logits[:, 0, : self._vocab]
        cache.advance([len(each) for each in waiting])
        for state in states:
            state.ran = depth
        return logits

    @without_autograd
    def _catch_up(self, state: SmallModelState) -> None:
        """Run all that waits but the root, in parts, and let other requests begin with it."""
        small, kv = self._small, _kv(state)
        with small.lock:
            try:
                while waiting := state.text[kv.length : -1][:_CHUNK]:
                    cache = small.cache.bind([kv])
                    small.forward(self._chain([waiting]), cache, last_only=True)
                    cache.advance([len(waiting)])
                kv.publish(state.text, kv.length)
            except PoolFullError:
                self._release(state)

    def _release(self, state: SmallModelState) -> None:
        """Give the blocks back; what they hold of the text may serve another request."""
        kv, state.kv = state.kv, None
        if kv is not None:
            with self._small.lock:
                kv.release(state.text, min(kv.length, len(state.text)))

    def _chain(self, texts: Sequence[Sequence[int]]) -> DraftTree:
        """One chain per row, shorter ones padded."""
        longest, device = max(map(len, texts)), self._small.device
        tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
        live = None
        if any(len(text) < longest for text in texts):
            live = to_device(torch.arange(longest) < torch.tensor([[len(text)] for text in texts]), device)
        return DraftTree.chain(self._known(to_device(tokens, device)), live)

    def _distributions(
        self, sampler: Sampler, states: Sequence[SmallModelState], drafted: Sequence[Tensor], logits: Tensor
    ) -> Tensor:
        """The processed distribution (rows, vocab) of each row's next draft, after its text and what was drafted."""
        texts: list[Sequence[int]] = [state.text for state in states]
        if not sampler.stateless:
            own = torch.stack(list(drafted), 1).tolist() if drafted else [[]] * len(states)
            # A token that the small model does not know was never drafted here: the penalty may leave it out.
            known = self._small.vocab_size
            texts = [[t for t in (*text, *said) if t < known] for text, said in zip(texts, own, strict=True)]
        found = [sampler.probs(text, scores) for text, scores in zip(texts, logits, strict=True)]
        return pad(torch.stack(found), (0, self._vocab - found[0].shape[0]))

    def _drawn(self, states: Sequence[SmallModelState], depth: int, probs: Tensor) -> Tensor:
        """One draft per row, (rows,). Keyed by the root's position: every step draws anew, see `haast.engine.rules`."""
        tokens = [
            inverse_cdf(each, keyed_uniform(*state.key, len(state.text), DRAFT, depth))
            for state, each in zip(states, probs, strict=True)
        ]
        return torch.tensor(tokens, device=probs.device)

    def _known(self, tokens: Tensor) -> Tensor:
        """Tokens of the target's padding, which no text holds, as the last token that the small model has."""
        return tokens.clamp_max(self._small.vocab_size - 1)


def _kv(state: SmallModelState) -> KVSequence:
    if state.kv is None:
        raise RuntimeError("the request has given its blocks of the small model's pool back and can't be drafted for")
    return state.kv


def _check_vocabularies(target: Target, small: Target) -> None:
    """Refuse another tokenizer's model. Without tokenizers, equal sizes are all that can be asked for."""
    if target.tokenizer is not None and small.tokenizer is not None:
        if target.tokenizer.get_vocab() != small.tokenizer.get_vocab():
            raise HeadMismatchError(
                "the small model has another tokenizer than the target, so its drafts would mean other words: take a "
                "smaller model of the same tokenizer"
            )
    elif small.vocab_size != target.vocab_size:
        raise HeadMismatchError(
            f"the small model has a vocabulary of {small.vocab_size} tokens, the target one of {target.vocab_size}: "
            "take a smaller model of the same tokenizer (and load both with it, if only the padding differs)"
        )
