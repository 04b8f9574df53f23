"""The decode loop: propose, forward, verify, commit, observe, yield. Every decoder runs through it.

Owns stop rules, truncation, counting and the clock. Knows token ids only, neither text nor any particular drafter.
Prefill has a step's shape (a chain of prompt tokens, all kept), so one path serves both. Source: EAGLE (arXiv
2401.15077, figure 5), speculative decoding (arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from time import perf_counter

import torch
from torch import Tensor

from haast.acceptance import AcceptanceRule
from haast.agreement import agreement
from haast.cache import TreeCache, packed_order
from haast.drafters.base import Accepted, Drafter
from haast.errors import PromptError
from haast.past import Past
from haast.sampling import Sampler, SamplingConfig
from haast.stats import Stats
from haast.target import Target, TargetOutput
from haast.tree import DraftTree
from haast.verify import RowVerdict, Verdict, verify

__all__ = ["PREFILL_CHUNK", "Emission", "Engine", "Stats", "Step", "StopConfig", "check_prompts"]
# Prompt positions a forward. They bound the activations, and what grows with them times the positions before: masks
# and, where modules answer, attention scores.
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class StopConfig:
    """When a row ends: after `max_new_tokens`, behind an end token, or when `stop` says so of its new tokens."""

    max_new_tokens: int = 256
    eos_ids: tuple[int, ...] = ()
    stop: Callable[[int, Sequence[int]], bool] | None = None  # (row, its new tokens so far) -> end here?

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, Integral) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens!r} is not allowed: give 1 or more")


@dataclass(frozen=True)
class Emission:
    """Tokens one row emitted in one step; all but the last of a full step were drafted, the last is the bonus."""

    row: int
    tokens: tuple[int, ...]
    drafted: int  # how many of them, from the front, were drafted
    finished: bool


@dataclass(frozen=True)
class Step:
    """One decoding step as a watcher sees it. The tensors are the step's own: read them at once, keep none."""

    tree: DraftTree
    logits: Tensor  # (rows, nodes, vocab): the target's raw logits at every node
    verdict: Verdict
    emissions: tuple[Emission, ...]  # what the stop rules left of the verdict, of every row that was running
    rows: tuple[int, ...]  # which rows tree, logits and verdict are of, in their order; others have left
    ms_draft: float
    ms_verify: float
    ms_overhead: float


class Engine:
    """One target and one drafter, run over a batch of prompts.

    Args:
        target: the model.
        drafter: what drafts for it.
        rule: another acceptance rule than sample-and-match. Only sample-and-match promises vanilla's own text for a
            seed; see `haast.acceptance` for what each rule keeps, and which is lossy.
        prefill_chunk: prompt positions a forward, 1 or more; the text does not depend on it.

    Raises:
        ValueError: a chunk below 1.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        rule: AcceptanceRule | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        check_chunk(prefill_chunk)
        self.prefill_chunk = prefill_chunk
        self.target = target
        self.drafter = drafter
        self.rule = rule

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | Sampler,
        stop: StopConfig,
        stats: Stats | None = None,
        past: Past | None = None,
        watch: Callable[[Step], None] | None = None,
    ) -> Iterator[Emission]:
        """Decode every prompt; yields each row's tokens as they are settled. Safe to abandon at any point.

        Args:
            prompts: token ids per row, each non-empty.
            sampling: the law of the next token; draws are keyed by (seed, row, position). A `Sampler` chooses itself.
            stop: when a row ends.
            stats: filled as the run goes on.
            past: of one prompt: what an earlier run left, used where the texts begin the same, and left for the next.
            watch: called with every decoding step before its tokens are yielded; its own time is not counted.

        Raises:
            PromptError: a prompt is empty, or does not fit the target's context with one new token.
            ValueError: a past with several prompts.
        """
        check_prompts(prompts, self.target.context_length, self.target.vocab_size)
        if past is not None and len(prompts) > 1:
            raise ValueError(f"a past belongs to one text, not to {len(prompts)}: run them one by one, or leave it out")
        parts = (self.target, self.drafter, self.rule)
        return _Run(*parts, prompts, sampling, stop, stats or Stats(), past, watch, self.prefill_chunk).emissions()

    def complete(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, stop: StopConfig, stats: Stats | None = None
    ) -> list[list[int]]:
        """`run` to the end: each row's new tokens."""
        texts: list[list[int]] = [[] for _ in prompts]
        for emission in self.run(prompts, sampling, stop, stats):
            texts[emission.row].extend(emission.tokens)
        return texts


class _Run:
    """The state of one decode: cache, histories, which rows still run."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        rule: AcceptanceRule | None,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | Sampler,
        stop: StopConfig,
        stats: Stats,
        past: Past | None,
        watch: Callable[[Step], None] | None,
        chunk: int,
    ) -> None:
        self._chunk = chunk
        self._past, self._watch = past, watch
        self._device, self._agreement = target.device, agreement(target.ranks)
        self._drafter = self._agreement.drafter(drafter, self._device)
        self._target, self._stats, self._rule = target, stats, rule
        self._sampler = sampling if isinstance(sampling, Sampler) else Sampler(sampling)
        self._stop = stop
        self._histories = [list(prompt) for prompt in prompts]
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        self._running = [True] * len(prompts)
        self._rows = list(range(len(prompts)))  # those that still stand in the cache, in its order
        limit = target.context_length
        # A row whose context is full ends; verified nodes may stand beyond it but are never emitted.
        room = [stop.max_new_tokens if limit is None else min(stop.max_new_tokens, limit - len(p)) for p in prompts]
        self._allowed = room
        longest = max(self._prompt_lengths)
        self._cache: TreeCache = target.new_cache(len(prompts), longest + max(room) + drafter.nodes)

    def emissions(self) -> Iterator[Emission]:
        """Prefill, then step until every row has ended."""
        begun = perf_counter()
        self._agreement.check(self._histories, self._stop.max_new_tokens, self._chunk)
        with self._drafter.lock, self._whole():
            self._drafter.owner = self
            self._drafter.start(self._histories)
            if self._past is not None:
                self._recall(self._past)
            first = self._prefill()
        self._stats.ms_prefill += 1e3 * (perf_counter() - begun)
        yield from first
        while any(self._running):
            with self._drafter.lock, self._whole(), self._target.step_threads():
                emitted = self._step()
            yield from emitted

    def _recall(self, past: Past) -> None:
        """Begin behind what the past holds of this text, and let it hold what comes."""
        text = self._histories[0]
        self._cache = past.recall(self._target, self._drafter, text) or self._cache
        self._stats.recalled_tokens += self._cache.lengths[0]
        past.hold(self._target, self._drafter, self._cache, text)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """An interrupted forward may leave the caches of target and drafter apart: then the past is worth nothing."""
        try:
            yield
        except BaseException:
            if self._past is not None:
                self._past.forget()
            raise

    def _prefill(self) -> list[Emission]:
        prompts = [list(history) for history in self._histories]
        self._stats.prompt_tokens += sum(self._prompt_lengths)
        first: dict[int, int] = {}
        longest = max(self._prompt_lengths)
        for begin in range(min(self._cache.lengths), longest, self._chunk):
            end = min(begin + self._chunk, longest)
            counts = [max(0, min(length, end) - begin) for length in self._prompt_lengths]
            chunk = self._pad([prompt[begin:end] for prompt in prompts])
            live = (
                torch.arange(chunk.shape[1], device=chunk.device) < torch.tensor(counts, device=chunk.device)[:, None]
            )
            layers = self._drafter.target_layers
            tree = DraftTree.chain(chunk, live)
            output = self._target.forward(tree, self._cache, last_only=True, hidden_layers=layers)
            self._cache.commit([range(count) for count in counts])
            verdicts: list[RowVerdict | None] = []
            with self._agreement.deciding(self._sampler):
                for row, count in enumerate(counts):
                    following = prompts[row][begin + 1 : begin + count + 1]
                    if count and begin + count == self._prompt_lengths[row]:
                        first[row] = self._sampler.choose(row, self._histories[row], output.logits[row, 0])
                        following.append(first[row])
                    verdicts.append(RowVerdict(tuple(range(count)), tuple(following), ()) if count else None)
            self._observe(verdicts, output, stepped=False)
        with self._stopping() as decide:
            return [self._emit(row, (token,), 0, decide) for row, token in sorted(first.items())]

    def _step(self) -> list[Emission]:
        if self._drafter.owner is not self:
            raise RuntimeError(
                "another generation was started with this drafter while this one was running, so its drafts no longer "
                "belong to this text; finish one before you start the next, or load a second Haast"
            )
        start = perf_counter()
        self._part()
        tree = self._drafter.propose()
        drafted = self._now()
        output = self._target.forward(tree, self._cache, hidden_layers=self._drafter.target_layers)
        verified = self._now()
        histories = [self._histories[row] if self._running[row] else None for row in self._rows]
        verdict = self._judge(tree, output.logits, histories)
        self._cache.commit([None if row is None else row.path for row in verdict.rows])
        settled = self._now()
        self._observe(verdict.rows, output)
        observed = self._now()
        emitted = self._settle(verdict, tree.nodes)
        done = perf_counter()
        ms = (drafted - start + observed - settled, verified - drafted, settled - verified + done - observed)
        ms_draft, ms_verify, ms_overhead = (1e3 * seconds for seconds in ms)
        self._stats.ms_draft += ms_draft
        self._stats.ms_verify += ms_verify
        self._stats.ms_overhead += ms_overhead
        if self._watch is not None:
            times = (ms_draft, ms_verify, ms_overhead)
            self._watch(Step(tree, output.logits, verdict, tuple(emitted), tuple(self._rows), *times))
        return emitted

    def _part(self) -> None:
        """Rows that have ended leave: forwards go over the others alone. Compiled forwards keep their one shape."""
        stays = [self._running[row] for row in self._rows]
        if all(stays) or self._target.compiled is not None:
            return
        order = packed_order(stays)
        self._cache.keep(order)
        self._drafter.keep(order)
        self._rows = [self._rows[row] for row in order]

    def _judge(self, tree: DraftTree, logits: Tensor, histories: Sequence[Sequence[int] | None]) -> Verdict:
        rule = self._rule
        if rule is not None:
            return self._agreement.judged(lambda: rule.verify(tree, logits, self._sampler, histories, self._rows))
        with self._agreement.deciding(self._sampler):
            return verify(tree, logits, self._sampler, histories, self._rows)

    def _stopping(self) -> AbstractContextManager[Callable[[int], int]]:
        """What a stop rule of the user's says is agreed on: it may look at a clock."""
        return nullcontext(int) if self._stop.stop is None else self._agreement.deciding(self._sampler)

    def _settle(self, verdict: Verdict, nodes: int) -> list[Emission]:
        emitted = []
        with self._stopping() as decide:
            for row, kept in sorted(zip(self._rows, verdict.rows, strict=True), key=lambda each: each[0]):
                if kept is not None:
                    self._stats.nodes += nodes
                    position = len(self._histories[row]) - 1  # the root's
                    emission = self._emit(row, kept.tokens, len(kept.tokens) - 1, decide)
                    self._stats.count(kept, position, len(emission.tokens))
                    emitted.append(emission)
        return emitted

    def _emit(self, row: int, tokens: tuple[int, ...], drafted: int, decide: Callable[[int], int]) -> Emission:
        """Apply the stop rules to a row's new tokens, in the order in which vanilla would meet them."""
        history, begin = self._histories[row], self._prompt_lengths[row]
        kept = 0
        for token in tokens:
            history.append(token)
            kept += 1
            new = history[begin:]
            ends = token in self._stop.eos_ids or len(new) >= self._allowed[row]
            if self._stop.stop is not None:
                ends = bool(decide(self._stop.stop(row, new))) or ends
            if ends:
                self._running[row] = False
                break
        self._stats.tokens += kept
        return Emission(row, tokens[:kept], min(drafted, kept), not self._running[row])

    def _observe(self, rows: Sequence[RowVerdict | None], output: TargetOutput, stepped: bool = True) -> None:
        """Hand the drafter each row's kept positions: features there, and the tokens that follow."""
        device = output.features.device
        counts = tuple(0 if row is None else len(row.path) for row in rows)
        paths = self._pad([[] if row is None else row.path for row in rows]).to(device)
        tokens = self._pad([[] if row is None else row.tokens for row in rows])
        layers = self._drafter.target_layers
        features = torch.cat([output.hidden[i] for i in layers], dim=-1) if layers else output.features
        features = features.gather(1, paths.unsqueeze(2).expand(-1, -1, features.shape[2]))
        choices = output.logits.argmax(-1) if stepped and self._drafter.wants_choices else None
        self._drafter.observe(Accepted(tokens, features, counts, choices))

    def _pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        longest = max(len(row) for row in rows)
        padded = [list(row) + [0] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long, device=self._device)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # kernels run behind the host: a time without it means nothing
        return perf_counter()


def check_chunk(prefill_chunk: int) -> None:
    """Raises ValueError where prompts can't be run in chunks of this size."""
    if not isinstance(prefill_chunk, Integral) or prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk!r} is not allowed: give 1 or more prompt positions a forward")


def check_prompts(prompts: Sequence[Sequence[int]], context: int | None, vocab_size: int) -> None:
    """Refuse prompts that can't be answered, before any work.

    Raises:
        PromptError: no prompt, an empty one, one that fills the context, or an id outside the vocabulary.
    """
    if not prompts:
        raise PromptError("no prompt was given")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise PromptError(f"prompt {row} has no tokens; give at least one (a BOS token, say)")
        if context is not None and len(prompt) >= context:
            raise PromptError(
                f"prompt {row} has {len(prompt)} tokens, the target's context holds {context} and needs room for at "
                f"least one more; shorten the prompt"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise PromptError(f"prompt {row} holds token ids outside 0..{vocab_size - 1}: wrong tokenizer?")
