"""One step: what a batch of requests computes, drafts, keeps and says. Start reading here.

Owns the order of a step, forward only, and what every arrow passes on; who is in the batch is `scheduler`'s.

    1 drafter.propose            -> DraftTree      one tree per request
    2 target.forward(tree)       -> TargetOutput   one pass; position = length + depth; a node sees past and ancestors
    3 verify                     -> Verdict        all nodes' choices at once; one read to the host
    4 cache.keep, advance                          the accepted nodes' keys and values are committed
    5 drafter.observe(Accepted)                    tokens[i] is the token that FOLLOWS the position of features[i]
    6 emit                                         stop rules in token order, before anything is published

A prompt's chunk is a step without a proposal. Knows drafters and targets by their contracts only. Source: speculative
decoding (arXiv 2211.17192); EAGLE (arXiv 2401.15077, figure 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from haast.core import Accepted, Emission, Request, RowVerdict, Verdict
from haast.device import to_device
from haast.drafters.base import Drafter
from haast.engine.guiding import guided
from haast.engine.rules import AcceptanceRule
from haast.engine.tensor_parallel import Alone
from haast.engine.verify import Failures, check_possible, verify
from haast.stats import Stats
from haast.target.target import Target, TargetOutput
from haast.tree import DraftTree


@dataclass(frozen=True)
class Step:
    """One decoding step as a watcher sees it. The tensors are the step's own: read them at once, keep none."""

    tree: DraftTree
    logits: Tensor  # (rows, nodes, vocab): the target's raw logits at every node
    verdict: Verdict
    emissions: tuple[Emission, ...]  # what the stop rules left of the verdict, one per row
    rows: tuple[int, ...]  # the place of each row's request in its call
    ms_draft: float
    ms_verify: float
    ms_overhead: float


def decode(target: Target, group: Sequence[Request], rule: AcceptanceRule | None, agreement: Alone) -> None:
    """One step of requests that share a drafter and hold room for its nodes. `rule` None is sample-and-match.

    A request that ends has its `finish_reason` set; the caller frees what it holds.
    """
    start = perf_counter()
    drafter = group[0].drafter
    states = [request.draft_state for request in group]
    budget = None if drafter.policy is None else drafter.policy.budget(group)
    tree = agreement.proposed(lambda: guided(drafter.propose(states, budget), group), target.device)
    drafted = perf_counter()
    cache = target.cache.bind([request.kv for request in group])
    output = target.forward(tree, cache, hidden_layers=drafter.target_layers)
    forwarded = perf_counter()
    verdict = _judge(group, tree, output.logits, rule, agreement)
    if tree.height:
        cache.keep(verdict.path, verdict.counts)
    settled = perf_counter()
    if agreement.leads:
        drafter.observe(states, _accepted(drafter, verdict, output))
    observed = perf_counter()
    cache.advance([0 if row is None else len(row.path) for row in verdict.rows])
    emissions = _emit(group, verdict, tree, agreement)
    done = perf_counter()
    seconds = (drafted - start + observed - settled, forwarded - drafted, settled - forwarded + done - observed)
    rows, ms = tuple(request.row for request in group), (1e3 * each for each in seconds)
    _account(group, Step(tree, output.logits, verdict, tuple(emissions), rows, *ms))


def prefill(target: Target, batch: Sequence[tuple[Request, int]], agreement: Alone) -> None:
    """Compute so many next positions of several prompts; with a prompt's last ones comes its first new token.

    Args:
        target: the model.
        batch: requests that share a drafter and hold room for the longest of these chunks, and their chunks.
        agreement: see `tensor_parallel`.
    """
    begun = perf_counter()
    requests, counts = [request for request, _ in batch], [count for _, count in batch]
    drafter, rows, longest = requests[0].drafter, len(batch), max(counts)
    begins = [request.kv.length for request in requests]
    ends = [begin + count for begin, count in zip(begins, counts, strict=True)]
    places = list(zip(requests, begins, ends, strict=True))
    known = [request.tokens[begin + 1 : end + 1] for request, begin, end in places]  # those that follow
    parts = [*(request.tokens[begin:end] for request, begin, end in places), *known]
    padded = torch.tensor([[*part, *[0] * (longest - len(part))] for part in parts])
    text, following = to_device(padded.view(2, rows, longest), target.device)
    held = to_device(torch.tensor(counts), target.device)
    live = torch.arange(longest, device=target.device) < held.unsqueeze(1) if min(counts) < longest else None
    cache = target.cache.bind([request.kv for request in requests])
    tree = DraftTree.chain(text, live)
    output = target.forward(tree, cache, last_only=True, hidden_layers=drafter.target_layers)
    cache.advance(counts)
    first = [row for row, request in enumerate(requests) if ends[row] == len(request.tokens)]
    verdict = None
    if first:
        last = [counts[row] - 1 for row in first]
        verdict = _judge(
            [requests[row] for row in first], DraftTree.roots(text[first, last]), output.logits[first], None, agreement
        )
        following[first, last] = verdict.tokens[:, 0]
        for row, kept in zip(first, verdict.rows, strict=True):
            known[row] += [] if kept is None else kept.tokens
        if any(kept is None for kept in verdict.rows):  # a first token that failed follows nothing
            held = to_device(torch.tensor([len(each) for each in known]), target.device)
    if agreement.leads:
        states = [request.draft_state for request in requests]
        drafter.observe(states, Accepted(following, _features(drafter, output), held, known=known))
    for stats in _stats_of(requests):
        stats.ms_prefill += 1e3 * (perf_counter() - begun)
    if verdict is not None:
        _emit([requests[row] for row in first], verdict, None, agreement)


def _judge(
    group: Sequence[Request], tree: DraftTree, logits: Tensor, rule: AcceptanceRule | None, agreement: Alone
) -> Verdict:
    """What is kept of every row. A request whose own processors raise ends alone."""
    failures: Failures = {}
    choosers, histories = [request.chooser for request in group], [request.tokens for request in group]
    judge = verify if rule is None else rule.verify
    verdict = agreement.judged(lambda: judge(tree, logits, choosers, histories, failures), logits.device)
    for row, error in failures.items():
        group[row].fail(error)
    return verdict


def _accepted(drafter: Drafter, verdict: Verdict, output: TargetOutput) -> Accepted:
    """Each row's kept positions for the drafter: features there, and the tokens that follow."""
    path, tokens = verdict.path, verdict.tokens
    if path.device.type == "cpu":  # values are at hand here, and padding would be computed
        longest = max((len(row.path) for row in verdict.rows if row is not None), default=1)
        path, tokens = path[:, :longest], tokens[:, :longest]
    features = _features(drafter, output)
    features = features.gather(1, path.unsqueeze(2).expand(-1, -1, features.shape[2]))
    choices = output.logits.argmax(-1) if drafter.wants_choices else None
    return Accepted(tokens, features, verdict.counts, choices, verdict)


def _features(drafter: Drafter, output: TargetOutput) -> Tensor:
    layers = drafter.target_layers
    return torch.cat([output.hidden[i] for i in layers], dim=-1) if layers else output.features


def _emit(group: Sequence[Request], verdict: Verdict, tree: DraftTree | None, agreement: Alone) -> list[Emission]:
    """Apply stop rules in the order in which vanilla would meet them, and publish what is left."""
    ends = agreement.settled(lambda: [_end(r, row) for r, row in zip(group, verdict.rows, strict=True)])
    emissions = []
    for request, row, (kept, reason) in zip(group, verdict.rows, ends, strict=True):
        if reason == "error" and request.error is None:
            request.fail(RuntimeError("this request failed in the first process, whose error says why"))
        if row is None or not kept:
            emissions.append(Emission(request.row, (), 0, bool(request.finish_reason)))
            continue
        position = len(request.tokens) - 1  # the root's
        drafted = 0 if tree is None else min(len(row.tokens) - 1, kept)
        emission = Emission(request.row, row.tokens[:kept], drafted, bool(reason))
        request.tokens.extend(emission.tokens)
        request.emissions.append(emission)  # before it is done: another thread may be waiting for either
        request.finish_reason = reason or request.finish_reason
        emissions.append(emission)
        request.stats.tokens += kept
        if tree is not None:
            request.stats.nodes += tree.nodes
            request.stats.count(len(row.path), row.first_choice, position, kept)
            if request.drafter.policy is not None:
                request.drafter.policy.observed(request, row, tree.nodes)
    return emissions


def _end(request: Request, row: RowVerdict | None) -> tuple[int, str]:
    """How many of a row's new tokens stay, and why it ends there; 0 where its stop rule raised."""
    if request.error is not None:
        return 0, "error"
    if row is None:
        return 0, ""
    new = request.new_tokens if request.stop.stop is not None else []
    count = len(request.tokens) - request.prompt_length
    try:
        check_possible(row, len(request.tokens))
        for kept, token in enumerate(row.tokens, start=1):
            new.append(token)
            reason = "stop" if token in request.stop.eos_ids else ""
            if request.stop.stop is not None and request.stop.stop(new):
                reason = "stop"
            if count + kept >= request.limit:
                reason = reason or "length"
            if reason:
                return kept, reason
    except Exception as error:
        request.fail(error)
        return 0, "error"
    return len(row.tokens), ""


def _account(group: Sequence[Request], step: Step) -> None:
    """Book the step's times, and show it to those who watch."""
    for stats in _stats_of(group):
        stats.ms_draft += step.ms_draft
        stats.ms_verify += step.ms_verify
        stats.ms_overhead += step.ms_overhead
    watchers = {id(request.watch): request.watch for request in group if request.watch is not None}
    for watch in watchers.values():
        try:
            watch(step)
        except Exception as error:
            for request in group:
                if request.watch is watch:
                    request.fail(error)


def _stats_of(group: Sequence[Request]) -> list[Stats]:
    """Each once: requests of one call share theirs."""
    return list({id(request.stats): request.stats for request in group}.values())
