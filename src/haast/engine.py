"""The decode loop: propose, forward, verify, commit, observe, yield. Every decoder runs through it.

Owns stop rules, truncation, counting and the clock. Knows token ids only, neither text nor any particular drafter.
Prefill has a step's shape (a chain of prompt tokens, all kept), so one path serves both. Source: EAGLE (arXiv
2401.15077, figure 5), speculative decoding (arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from haast.cache import TreeCache
from haast.drafters.base import Accepted, Drafter
from haast.errors import PromptError
from haast.sampling import Sampler, SamplingConfig
from haast.target import Target, TargetOutput
from haast.tree import DraftTree
from haast.verify import RowVerdict, Verdict, verify

_PREFILL = 512  # prompt positions a forward: bounds the memory of mask and activations


@dataclass(frozen=True)
class StopConfig:
    """When a row ends: after `max_new_tokens`, behind an end token, or when `stop` says so of its new tokens."""

    max_new_tokens: int = 256
    eos_ids: tuple[int, ...] = ()
    stop: Callable[[int, Sequence[int]], bool] | None = None  # (row, its new tokens so far) -> end here?

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} is not allowed: give 1 or more")


@dataclass
class Stats:
    """Counts and times of one run. Milliseconds are wall clock; prefill is apart, its first token is not in tau.

    tau = `decoded_tokens` / `target_forwards`: tokens emitted per decoding target forward and row, the bonus token
    included, prefill and its one token excluded, tokens cut off by a stop rule not counted.
    """

    prompt_tokens: int = 0
    tokens: int = 0  # emitted, the prefill's token included
    decoded_tokens: int = 0
    target_forwards: int = 0  # decoding steps, counted per row that was still running
    nodes: int = 0  # that those forwards ran over, roots included
    accepted_by_depth: list[int] = field(default_factory=list)  # [d]: steps that accepted a node at depth d + 1
    reached_by_depth: list[int] = field(default_factory=list)  # [d]: steps that had drafts at depth d + 1 to try
    first_choice_by_depth: list[int] = field(default_factory=list)  # [d]: ... whose preferred draft was right
    ms_prefill: float = 0.0
    ms_draft: float = 0.0
    ms_verify: float = 0.0  # target forward
    ms_overhead: float = 0.0  # acceptance, commit, stop rules

    @property
    def tau(self) -> float:
        """Tokens per decoding target forward; 0 before the first."""
        return self.decoded_tokens / self.target_forwards if self.target_forwards else 0.0

    @property
    def ms_decode(self) -> float:
        """Decoding time without prefill."""
        return self.ms_draft + self.ms_verify + self.ms_overhead

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second, prefill and its token excluded."""
        return 1e3 * self.decoded_tokens / self.ms_decode if self.ms_decode else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """[d]: chance that some draft at depth d + 1 is right, given that depth d was."""
        return [a / r if r else 0.0 for a, r in zip(self.accepted_by_depth, self.reached_by_depth, strict=True)]

    @property
    def alpha_by_depth(self) -> list[float]:
        """[d]: chance that the preferred draft at depth d + 1 is right, given that depth d was (0-alpha first)."""
        return [a / r if r else 0.0 for a, r in zip(self.first_choice_by_depth, self.reached_by_depth, strict=True)]

    def count(self, verdict: RowVerdict) -> None:
        """Take in one row's verdict of one step."""
        self.target_forwards += 1
        for depth, preferred in enumerate(verdict.first_choice):
            if depth == len(self.reached_by_depth):
                self.reached_by_depth.append(0)
                self.accepted_by_depth.append(0)
                self.first_choice_by_depth.append(0)
            self.reached_by_depth[depth] += 1
            self.accepted_by_depth[depth] += len(verdict.path) > depth + 1
            self.first_choice_by_depth[depth] += preferred


@dataclass(frozen=True)
class Emission:
    """Tokens one row emitted in one step; all but the last of a full step were drafted, the last is the bonus."""

    row: int
    tokens: tuple[int, ...]
    drafted: int  # how many of them, from the front, were drafted
    finished: bool


class Engine:
    """One target and one drafter, run over a batch of prompts."""

    def __init__(self, target: Target, drafter: Drafter) -> None:
        self.target = target
        self.drafter = drafter

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | Sampler,
        stop: StopConfig,
        stats: Stats | None = None,
    ) -> Iterator[Emission]:
        """Decode every prompt; yields each row's tokens as they are settled. Safe to abandon at any point.

        Args:
            prompts: token ids per row, each non-empty.
            sampling: the law of the next token; draws are keyed by (seed, row, position). A `Sampler` chooses itself.
            stop: when a row ends.
            stats: filled as the run goes on.

        Raises:
            PromptError: a prompt is empty, or does not fit the target's context with one new token.
        """
        check_prompts(prompts, self.target.context_length, self.target.vocab_size)
        return _Run(self.target, self.drafter, prompts, sampling, stop, stats or Stats()).emissions()

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
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | Sampler,
        stop: StopConfig,
        stats: Stats,
    ) -> None:
        self._target, self._drafter, self._stats = target, drafter, stats
        self._device = target.device
        self._sampler = sampling if isinstance(sampling, Sampler) else Sampler(sampling)
        self._stop = stop
        self._histories = [list(prompt) for prompt in prompts]
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        self._running = [True] * len(prompts)
        limit = target.context_length
        # A row whose context is full ends; verified nodes may stand beyond it but are never emitted.
        room = [stop.max_new_tokens if limit is None else min(stop.max_new_tokens, limit - len(p)) for p in prompts]
        self._allowed = room
        longest = max(self._prompt_lengths)
        self._cache: TreeCache = target.new_cache(len(prompts), longest + max(room) + drafter.nodes)

    def emissions(self) -> Iterator[Emission]:
        """Prefill, then step until every row has ended."""
        begun = perf_counter()
        with self._drafter.lock:
            self._drafter.owner = self
            self._drafter.start(self._histories)
            first = self._prefill()
        self._stats.ms_prefill += 1e3 * (perf_counter() - begun)
        yield from first
        while any(self._running):
            with self._drafter.lock, self._target.step_threads():
                emitted = self._step()
            yield from emitted

    def _prefill(self) -> list[Emission]:
        prompts = [list(history) for history in self._histories]
        self._stats.prompt_tokens += sum(self._prompt_lengths)
        first: dict[int, int] = {}
        longest = max(self._prompt_lengths)
        for begin in range(0, longest, _PREFILL):
            end = min(begin + _PREFILL, longest)
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
            for row, count in enumerate(counts):
                following = prompts[row][begin + 1 : begin + count + 1]
                if count and begin + count == self._prompt_lengths[row]:
                    first[row] = self._sampler.choose(row, self._histories[row], output.logits[row, 0])
                    following.append(first[row])
                verdicts.append(RowVerdict(tuple(range(count)), tuple(following), ()) if count else None)
            self._observe(verdicts, output, stepped=False)
        return [self._emit(row, (token,), 0) for row, token in sorted(first.items())]

    def _step(self) -> list[Emission]:
        if self._drafter.owner is not self:
            raise RuntimeError(
                "another generation was started with this drafter while this one was running, so its drafts no longer "
                "belong to this text; finish one before you start the next, or load a second Haast"
            )
        start = perf_counter()
        tree = self._drafter.propose()
        drafted = self._now()
        output = self._target.forward(tree, self._cache, hidden_layers=self._drafter.target_layers)
        verified = self._now()
        histories = [h if on else None for h, on in zip(self._histories, self._running, strict=True)]
        verdict = verify(tree, output.logits, self._sampler, histories)
        self._cache.commit([None if row is None else row.path for row in verdict.rows])
        settled = self._now()
        self._observe(verdict.rows, output)
        observed = self._now()
        emitted = self._settle(verdict, tree.nodes)
        done = perf_counter()
        self._stats.ms_draft += 1e3 * (drafted - start + observed - settled)
        self._stats.ms_verify += 1e3 * (verified - drafted)
        self._stats.ms_overhead += 1e3 * (settled - verified + done - observed)
        return emitted

    def _settle(self, verdict: Verdict, nodes: int) -> list[Emission]:
        emitted = []
        for row, kept in enumerate(verdict.rows):
            if kept is not None:
                self._stats.count(kept)
                self._stats.nodes += nodes
                emission = self._emit(row, kept.tokens, len(kept.tokens) - 1)
                self._stats.decoded_tokens += len(emission.tokens)
                emitted.append(emission)
        return emitted

    def _emit(self, row: int, tokens: tuple[int, ...], drafted: int) -> Emission:
        """Apply the stop rules to a row's new tokens, in the order in which vanilla would meet them."""
        history, begin = self._histories[row], self._prompt_lengths[row]
        kept = 0
        for token in tokens:
            history.append(token)
            kept += 1
            new = history[begin:]
            ends = token in self._stop.eos_ids or len(new) >= self._allowed[row]
            if self._stop.stop is not None:
                ends = self._stop.stop(row, new) or ends
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
