"""Feature extraction: runs the target over sequences and keeps features, captured states and the teacher's top tokens.

Owns extraction, in memory or into shards. Does not know heads or losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from haast.engine.engine import PREFILL_CHUNK
from haast.progress import Progress
from haast.target.target import Target
from haast.training.answers import record_key
from haast.training.batches import Example
from haast.training.data import TokenSequence
from haast.training.shards import ShardIdentity, check_room, read_shards, write_shards
from haast.tree import DraftTree

_LOGIT_ROWS = 256  # positions per chunk of logits
LEAST_TOKENS = 3  # of a sequence: two pairs of a feature and the token after, so that one predicts the other


@torch.inference_mode()
def stream_examples(
    target: Target,
    sequences: Sequence[TokenSequence],
    topk: int = 16,
    batch_tokens: int = 2048,
    layer_ids: Sequence[int] = (),
) -> Iterator[tuple[int, Example]]:
    """Compute the target's features of each sequence; nothing is written.

    Args:
        target: the model.
        sequences: at least three tokens each.
        topk: number of the teacher's top tokens per supervised position.
        batch_tokens: most positions in one forward, padding included.
        layer_ids: HF `hidden_states` indices to capture as well, for an Eagle3Head.

    Yields:
        Index into `sequences`, and its example, in order of length.
    """
    batches = list[list[int]]()
    for index in sorted(range(len(sequences)), key=lambda i: len(sequences[i].tokens)):
        if not batches or len(sequences[index].tokens) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    for batch in batches:
        rows = [torch.tensor(sequences[index].tokens) for index in batch]
        tokens, lengths = pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])
        mask = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)  # False on padding
        features, hidden = _states(target, tokens.to(target.device), mask.to(target.device), layer_ids)
        for row, index in enumerate(batch):
            length = len(sequences[index].tokens)
            yield index, make_example(target, sequences[index], features[row, :length], topk, hidden[row, :length])


def _states(target: Target, tokens: Tensor, mask: Tensor, layer_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Features (rows, n, hidden), and the captured states (rows, n, width) in fp16 on the CPU; runs chunk by chunk."""
    cache = target.new_cache(*tokens.shape)
    features, hidden = list[Tensor](), list[Tensor]()
    chunks = (torch.split(each, PREFILL_CHUNK, dim=1) for each in (tokens, mask))
    for chunk, chunk_mask in zip(*chunks, strict=True):
        # Logits are computed later, for the answers only.
        output = target.forward(DraftTree.chain(chunk, chunk_mask), cache, last_only=True, hidden_layers=layer_ids)
        cache.advance(chunk_mask.sum(1).tolist())
        captured = [output.hidden[index] for index in layer_ids] or [output.features[..., :0]]
        features.append(output.features)
        hidden.append(torch.cat(captured, dim=-1).half().cpu())
    return torch.cat(features, 1), torch.cat(hidden, 1)


@torch.inference_mode()
def make_example(
    target: Target, sequence: TokenSequence, features: Tensor, topk: int, hidden: Tensor | None = None
) -> Example:
    """A sequence with its features and the teacher's top tokens.

    Args:
        target: the model.
        sequence: n tokens.
        features: (n, hidden).
        topk: number of the teacher's top tokens per supervised position.
        hidden: captured states (n, width) in fp16; None: no layers are captured.

    Raises:
        ValueError: states that fp16 cannot hold.
    """
    supervised = torch.tensor(sequence.supervised)
    # Positions with a teacher: supervised ones, and those that predict the first token of an answer.
    answers = supervised | torch.cat([supervised[1:], supervised.new_zeros(1)])
    ids = torch.zeros(len(sequence.tokens), topk, dtype=torch.int32)
    probs = torch.zeros(len(sequence.tokens), topk, dtype=torch.float16)
    for rows in torch.split(answers.nonzero()[:, 0], _LOGIT_ROWS):
        logits = target.head_logits(features[rows.to(features.device)].to(target.device)).float()
        values, best = logits.topk(topk, dim=-1)
        ids[rows], probs[rows] = best.int().cpu(), (values - logits.logsumexp(-1, keepdim=True)).exp().half().cpu()
    tokens, features = torch.tensor(sequence.tokens, dtype=torch.int32), features.half().cpu()
    hidden = features[:, :0] if hidden is None else hidden
    if not all(bool(torch.isfinite(states).all()) for states in (features, hidden)):
        raise ValueError(
            "features or hidden states of this target exceed the range of fp16 (65504), so they cannot be stored"
        )
    return Example(tokens, features, supervised.to(torch.uint8), ids, probs, hidden.clone())


def extract(
    target: Target,
    sequences: Sequence[TokenSequence],
    folder: Path,
    identity: ShardIdentity,
    *,
    max_gb: float = 20.0,
    quiet: bool = False,
) -> int:
    """Write shards of the target's features; sequences that the folder already has are skipped.

    Returns:
        Number of sequences added.

    Raises:
        ValueError: over `max_gb` or the free disk space (checked before the model runs), or the disk filled up.
    """
    if folder.exists() and any(folder.glob("*.safetensors")):
        done = {record_key(record) for record in read_shards(folder, identity, exactly=True)[1]}
        sequences = [s for s in sequences if record_key(s.record) not in done]
    sequences = [s for s in sequences if len(s.tokens) >= LEAST_TOKENS]
    check_room(folder, sum(len(s.tokens) for s in sequences), identity, max_gb)
    stream = stream_examples(target, sequences, identity.topk, layer_ids=identity.layer_ids)
    examples = _with_progress(stream, sequences, quiet)
    write_shards(folder, identity, ((example, sequences[index].record) for index, example in examples))
    return len(sequences)


def in_memory(
    target: Target, sequences: Sequence[TokenSequence], topk: int = 16, layer_ids: Sequence[int] = ()
) -> list[Example]:
    """Examples of `sequences` (at least three tokens each), in their order; nothing is written."""
    examples = dict(_with_progress(stream_examples(target, sequences, topk, layer_ids=layer_ids), sequences))
    return [examples[index] for index in range(len(sequences))]


def _with_progress(
    stream: Iterator[tuple[int, Example]], sequences: Sequence[TokenSequence], quiet: bool = False
) -> Iterator[tuple[int, Example]]:
    """Pass `stream` on and show a progress bar."""
    with Progress("features", "tokens", sum(len(s.tokens) for s in sequences), quiet=quiet) as progress:
        for index, example in stream:
            yield index, example
            progress.step(len(example.tokens))
