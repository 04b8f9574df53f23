"""What a `generate` call returns and streams. Owns shapes only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from haast.integrations.rows import Rows


class Live:
    """Hands a streamer the new tokens, one of every row at a time, as stock `generate` does."""

    def __init__(self, streamer: BaseStreamer | None, rows: Rows, pad: int) -> None:
        self._streamer, self._rows, self._pad, self._sent = streamer, rows, pad, 0

    def flush(self) -> None:
        """Hand over what is settled."""
        while self._streamer is not None:
            column = self._rows.column(self._sent, self._pad)
            if column is None:
                return
            self._streamer.put(column)  # type: ignore[no-untyped-call]
            self._sent += 1

    def end(self) -> None:
        """Say that all rows have ended."""
        if self._streamer is not None:
            self.flush()
            self._streamer.end()  # type: ignore[no-untyped-call]


def assembled(rows: Rows, input_ids: Tensor, pad: int, config: GenerationConfig) -> GenerateDecoderOnlyOutput | Tensor:
    """The sequences (rows, width + longest), padded after their ends; with scores and logits if asked for.

    A row that has ended has `pad` for certain: score 0 there and -inf elsewhere. `past_key_values` stays None.
    """
    said = [row.tokens[: row.end] for row in rows.rows]
    ends = [len(tokens) for tokens in said]
    new = [tokens + [pad] * (max(ends) - len(tokens)) for tokens in said]
    sequences = torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    scores = _by_step([row.kept_scores for row in rows.rows], ends, pad) if config.output_scores else None
    logits = _by_step([row.kept_logits for row in rows.rows], ends, pad) if config.output_logits else None
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits)  # type: ignore[arg-type]


def _by_step(kept: Sequence[Sequence[Tensor]], ends: Sequence[int], pad: int) -> tuple[Tensor, ...]:
    """Rows of (vocab,) per step -> one (rows, vocab) per step."""
    certain = torch.full_like(kept[0][0], -torch.inf)
    if 0 <= pad < len(certain):
        certain[pad] = 0.0
    steps = range(max(ends))
    return tuple(
        torch.stack([row[step] if step < end else certain for row, end in zip(kept, ends, strict=True)])
        for step in steps
    )
