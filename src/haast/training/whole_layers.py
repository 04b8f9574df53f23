"""Training passes of heads whose layers are run whole, since their parts are the target's class's own (MTP).

The same chain of passes as in `training_time_test`, by forwards of the head's module over all pairs so far: those of
the batch, then those of each pass. A pair of pass s at position t continues the chain that began s positions before:

    sees    pairs of the batch up to t - s, in its own sequence; of the passes those of its own chain
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from haast.heads.module import DraftModule
from haast.training.batches import PackedBatch
from haast.training.training_time_test import next_is_adjacent


def whole_layer_passes(
    head: DraftModule, batch: PackedBatch, embeddings: Tensor, features: Tensor, passes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the outputs of each pass, as `training_time_test.chain_passes` does, with the same arguments."""
    device = embeddings.device
    sequence = torch.repeat_interleave(torch.arange(len(batch.lengths), device=device), batch.lengths)
    pairs = begin = torch.arange(
        len(sequence), device=device
    )  # of each pair: its place in the batch, its chain's begin
    number = torch.zeros_like(pairs)  # of its pass
    states = head.fuse(features)
    rows = torch.arange(batch.supervised_count, device=device)
    found = _forward(head, embeddings, states, batch, sequence, pairs, begin, number)[batch.queries]
    yield found, rows
    adjacent, begun = next_is_adjacent(batch), batch.queries
    for current in range(1, passes):
        keep = adjacent[rows]
        rows, begun = rows[keep] + 1, begun[keep]
        if not rows.numel():
            return
        pairs, begin = torch.cat([pairs, batch.queries[rows]]), torch.cat([begin, begun])
        number = torch.cat([number, torch.full_like(rows, current)])
        states = torch.cat([states, found[keep]])
        found = _forward(head, embeddings, states, batch, sequence, pairs, begin, number)[-len(rows) :]
        yield found, rows


def _forward(
    head: DraftModule,
    embeddings: Tensor,
    states: Tensor,
    batch: PackedBatch,
    sequence: Tensor,
    pairs: Tensor,
    begin: Tensor,
    number: Tensor,
) -> Tensor:
    """The head's output (n, hidden) for all pairs so far."""
    first, own = (number == 0).unsqueeze(0), (begin.unsqueeze(0) == begin.unsqueeze(1))
    prefix = (sequence[pairs].unsqueeze(0) == sequence[pairs].unsqueeze(1)) & (pairs.unsqueeze(0) <= begin.unsqueeze(1))
    chain = own & (number.unsqueeze(0) <= number.unsqueeze(1))
    bias = torch.zeros(len(pairs), len(pairs), dtype=states.dtype, device=states.device)
    bias = bias.masked_fill(~torch.where(first, prefix, chain), torch.finfo(states.dtype).min)
    positions = batch.positions[pairs].unsqueeze(0)
    output: Tensor = head(embeddings[pairs].unsqueeze(0), states.unsqueeze(0), positions, bias[None, None])
    return output[0]
