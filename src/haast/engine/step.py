"""One step of a batch of requests: draft, verify, commit, emit. Start reading here.

Owns the order of a step and the data between its parts; the scheduler chooses the batch.

    1 drafter.propose            -> DraftTree      one tree per request
    2 target.forward(tree)       -> TargetOutput   one pass; position = length + depth; a node sees past and ancestors
    3 verify                     -> Verdict        all nodes at once; one read from the device
    4 cache.keep                                   moves accepted nodes' keys, values to the committed ones
    5 drafter.observe(Accepted)                    tokens[i] is the token that FOLLOWS the position of features[i]
    6 cache.advance, emit                          commits them; applies stop rules in token order, then publishes

A rejected node's keys and values lie after the committed length, where the next forward writes over them.

A prefill chunk is a step without a draft. Knows drafters and targets by their interfaces only. Source: speculative
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
from haast.errors import PromptError
from haast.stats import Stats
from haast.target.target import Target, TargetOutput
from haast.tree import DraftTree


@dataclass(frozen=True)
class Step:
    """One decoding step, passed to `watch` callbacks. Later steps overwrite the tensors: copy what you keep."""

    tree: DraftTree
    logits: Tensor  # (rows, nodes, vocab): the target's raw logits at every node
    verdict: Verdict
    emissions: tuple[Emission, ...]  # one per row, after stop rules
    rows: tuple[int, ...]  # per row, the index of its request in its call
    ms_draft: float
    ms_verify: float
    ms_overhead: float


def decode(target: Target, group: Sequence[Request], rule: AcceptanceRule | None, agreement: Alone) -> None:
    """One decoding step of requests that share a drafter and have reserved slots. `rule` None is sample-and-match.

    Sets the `finish_reason` of requests that end; the caller frees their blocks.
    """
    start = perf_counter()
    drafter = group[0].drafter
    states = [request.draft_state for request in group]
    budget = None if drafter.policy is None else drafter.policy.budget(group)
    tree = agreement.trees(lambda: guided(drafter.propose(states, budget), group), target.device)
    drafted = perf_counter()
    cache = target.cache.bind([request.kv for request in group])
    output = target.forward(tree, cache, hidden_layers=drafter.target_layers)
    forwarded = perf_counter()
    verdict = _verify(group, tree, output.logits, rule, agreement)
    if tree.height:
        cache.keep(verdict.path, verdict.counts)
    verdict = _possible(group, verdict)
    verified = perf_counter()
    if agreement.leads:
        drafter.observe(states, _accepted(drafter, verdict, output))
    observed = perf_counter()
    cache.advance([0 if row is None else len(row.path) for row in verdict.rows])
    emissions = _emit(group, verdict, tree, agreement)
    done = perf_counter()
    seconds = (drafted - start + observed - verified, forwarded - drafted, verified - forwarded + done - observed)
    rows, ms = tuple(request.row for request in group), (1e3 * each for each in seconds)
    _report(group, Step(tree, output.logits, verdict, tuple(emissions), rows, *ms))


def prefill(target: Target, batch: Sequence[tuple[Request, int]], agreement: Alone) -> None:
    """Prefill one chunk of several prompts; a prompt's last chunk also gives its first new token.

    Args:
        target: the model.
        batch: requests and their chunk lengths; they share a drafter and have slots reserved for the longest chunk.
        agreement: see `tensor_parallel`.
    """
    start = perf_counter()
    requests, counts = [request for request, _ in batch], [count for _, count in batch]
    drafter, rows, longest = requests[0].drafter, len(batch), max(counts)
    begins = [request.kv.length for request in requests]
    ends = [begin + count for begin, count in zip(begins, counts, strict=True)]
    spans = list(zip(requests, begins, ends, strict=True))
    next_tokens = [request.tokens[begin + 1 : end + 1] for request, begin, end in spans]
    parts = [*(request.tokens[begin:end] for request, begin, end in spans), *next_tokens]
    padded = torch.tensor([[*part, *[0] * (longest - len(part))] for part in parts])
    text, following = to_device(padded.view(2, rows, longest), target.device)
    committed = to_device(torch.tensor(counts), target.device)
    live = torch.arange(longest, device=target.device) < committed.unsqueeze(1) if min(counts) < longest else None
    cache = target.cache.bind([request.kv for request in requests])
    tree = DraftTree.chain(text, live)
    inputs = requests[0].inputs if begins[0] == 0 else None  # such a request is alone in its forward
    output = target.forward(tree, cache, last_only=True, hidden_layers=drafter.target_layers, inputs=inputs)
    cache.advance(counts)
    complete = [row for row, request in enumerate(requests) if ends[row] == len(request.tokens)]
    verdict = None
    if complete:
        last = [counts[row] - 1 for row in complete]
        roots, logits = DraftTree.roots(text[complete, last]), output.logits[complete]
        ending = [requests[row] for row in complete]
        verdict = _possible(ending, _verify(ending, roots, logits, None, agreement))
        following[complete, last] = verdict.tokens[:, 0]
        for row, row_verdict in zip(complete, verdict.rows, strict=True):
            next_tokens[row] += [] if row_verdict is None else row_verdict.tokens
        if any(row_verdict is None for row_verdict in verdict.rows):  # failed: its last position has no next token
            committed = to_device(torch.tensor([len(each) for each in next_tokens]), target.device)
    if agreement.leads:
        states, features = [request.draft_state for request in requests], _features(drafter, output)
        drafter.observe(states, Accepted(following, features, committed, tokens_on_host=next_tokens))
    for stats in _unique_stats(requests):
        stats.ms_prefill += 1e3 * (perf_counter() - start)
    if verdict is not None:
        _emit([requests[row] for row in complete], verdict, None, agreement)


def _verify(
    group: Sequence[Request], tree: DraftTree, logits: Tensor, rule: AcceptanceRule | None, agreement: Alone
) -> Verdict:
    """Verify every row. A request whose own processors raise ends; the others go on."""
    failures: Failures = {}
    choosers, histories = [request.chooser for request in group], [request.tokens for request in group]
    function = verify if rule is None else rule.verify
    verdict = agreement.verdict(lambda: function(tree, logits, choosers, histories, failures), logits.device)
    for row, error in failures.items():
        group[row].fail(error)
    return verdict


def _possible(group: Sequence[Request], verdict: Verdict) -> Verdict:
    """The verdict, each row up to the first node after which no token is possible; at the root, its request ends.

    A drafter must not see such a token: what it does with it would fail for all rows. Below the root the text may end
    before, as in vanilla decoding; if it does not, that node is the next step's root.
    """
    rows = list(verdict.rows)
    for place, (request, row) in enumerate(zip(group, verdict.rows, strict=True)):
        kept = 0 if row is None else next((depth for depth, token in enumerate(row.tokens) if token < 0), None)
        if row is not None and kept:
            rows[place] = RowVerdict(row.path[:kept], row.tokens[:kept], row.first_choice[:kept])
        elif kept == 0:
            rows[place] = None
            try:
                check_possible(row, len(request.tokens))
            except PromptError as error:
                request.fail(error)
    return verdict if rows == list(verdict.rows) else Verdict.of_rows(rows, verdict.packed.device)


def _accepted(drafter: Drafter, verdict: Verdict, output: TargetOutput) -> Accepted:
    """The accepted positions for the drafter: their features, and the tokens that follow them."""
    path, tokens = verdict.path, verdict.tokens
    if path.device.type == "cpu":  # reading values is free here, and cutting the padding saves work
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
    """Apply stop rules in token order, as in vanilla decoding, and publish the remaining tokens."""
    ends = agreement.ends(lambda: [_stop_point(r, row) for r, row in zip(group, verdict.rows, strict=True)])
    emissions = []
    for request, row, (kept, reason) in zip(group, verdict.rows, ends, strict=True):
        if reason == "error" and request.error is None:
            request.fail(RuntimeError("this request failed in the first process: see the error there"))
        if row is None or not kept:
            emissions.append(Emission(request.row, (), 0, bool(request.finish_reason)))
            continue
        position = len(request.tokens) - 1  # the root's
        drafted = 0 if tree is None else min(len(row.tokens) - 1, kept)
        emission = Emission(request.row, row.tokens[:kept], drafted, bool(reason))
        request.tokens.extend(emission.tokens)
        request.emissions.append(emission)  # before `finish_reason`: a waiting thread must find the last tokens
        request.finish_reason = reason or request.finish_reason
        emissions.append(emission)
        request.stats.tokens += kept
        if tree is not None:
            request.stats.nodes += tree.nodes
            request.stats.count(len(row.path), row.first_choice, position, kept)
            if request.drafter.policy is not None:
                request.drafter.policy.observed(request, row, tree.nodes)
    return emissions


def _stop_point(request: Request, row: RowVerdict | None) -> tuple[int, str]:
    """Number of a row's new tokens to emit, and the finish reason ("" to continue); 0 if its stop rule raised."""
    if request.error is not None:
        return 0, "error"
    if row is None:
        return 0, ""
    new = request.new_tokens if request.stop.stop is not None else []
    count = len(request.tokens) - request.prompt_length
    try:
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


def _report(group: Sequence[Request], step: Step) -> None:
    """Add the step's times to the statistics and call the requests' `watch` callbacks."""
    for stats in _unique_stats(group):
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


def _unique_stats(group: Sequence[Request]) -> list[Stats]:
    """The statistics of these requests, each once: requests of one call share them."""
    return list({id(request.stats): request.stats for request in group}.values())
