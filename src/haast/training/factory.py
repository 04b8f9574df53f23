"""Which head and which loss a configuration asks for. Owns the choice between the kinds; knows no loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from haast.heads.config import HeadSizes
from haast.heads.eagle3 import Eagle3Config
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig
from haast.heads.medusa import MedusaConfig
from haast.training.batches import Example
from haast.training.bigrams import bigram_directions
from haast.training.config import TrainConfig
from haast.training.medusa import MedusaObjective, WhitenedMedusa
from haast.training.normalized_eagle3 import WhitenedEagle3
from haast.training.normalized_head import Scales, TrainedHead, Whitened, WhitenedHead
from haast.training.objective import Objective
from haast.training.target_weights import Frozen


def make_head(
    config: TrainConfig,
    head_config: HeadSizes,
    frozen: Frozen,
    examples: Sequence[Example],
    draft_vocab: Tensor,
) -> Whitened:
    """A head of the asked kind at its start: random, but LM heads of its own and an Eagle3Head's norm the target's."""
    scales = Scales.measure(list(examples), frozen.embeddings)
    if isinstance(head_config, MedusaConfig):
        return WhitenedMedusa(head_config, scales, frozen.head[draft_vocab])
    if isinstance(head_config, Eagle3Config):
        sizes = Eagle3Config(**(asdict(head_config) | {"draft_vocab_size": len(draft_vocab)}))
        random = config.initialisation == "random"
        rows, gain = (None, None) if random else (frozen.head[draft_vocab], frozen.final_gain)
        head: TrainedHead = WhitenedEagle3(sizes, scales, gain, rows, config.output_init, config.seed)
    else:
        assert isinstance(head_config, FeatExtrapolatorConfig), "there are three kinds"
        head = WhitenedHead(head_config, scales, config.output_init, config.seed, len(draft_vocab))
    if head_config.markov_rank and config.initialisation != "random":
        directions = bigram_directions(examples, head_config.vocab_size, draft_vocab, head_config.markov_rank)
        with torch.no_grad():
            head.markov_embed.copy_(directions)
    return head


def make_objective(
    head: Whitened, frozen: Frozen, draft_vocab: Tensor, config: TrainConfig, device: torch.device
) -> Objective | MedusaObjective:
    """The loss of a head that `make_head` made."""
    if isinstance(head, WhitenedMedusa):
        return MedusaObjective(head, frozen, draft_vocab, config, device)
    assert isinstance(head, TrainedHead), "an EAGLE head"
    return Objective(head, frozen, draft_vocab, config, device)
