"""Medusa's own layout: `{i}.{j}.linear.*` for block j of head i, `{i}.{blocks}.weight` for its LM head.

The number of heads and blocks comes from the tensors: `medusa_num_heads` of the public heads is wrong.
"""

from __future__ import annotations

from typing import Any

import torch

from haast.formats.base import Format, HeadFiles, Question, Reading, ServingEngine, TargetFacts, WrittenHead
from haast.formats.layout import Names, build_config
from haast.heads.config import HeadSizes
from haast.heads.medusa import MedusaConfig


class Medusa(Format):
    """See the module docstring."""

    name = "Medusa"
    kinds = ("medusa",)

    def detect(self, kind: str, files: HeadFiles) -> bool:
        return kind in self.kinds

    def read_config(self, files: HeadFiles, facts: TargetFacts) -> HeadSizes:
        names = [name.removeprefix("medusa_head.").split(".") for name in files.tensors]
        blocks = max((int(part[1]) + 1 for part in names if "linear" in part), default=0)
        heads = 1 + max(int(part[0]) for part in names)
        hidden = _unprefixed(files).get(f"0.{blocks}.weight")
        if hidden is None or hidden.dim() != 2:
            raise files.error(f"0.{blocks}.weight, the first head's LM head, is missing", "fetch the heads again")
        sizes = {"hidden_size": int(hidden.shape[1]), "vocab_size": int(facts.config.vocab_size)}
        config: HeadSizes = build_config(files, MedusaConfig, **sizes, heads=heads, blocks=blocks)
        return config

    def map_names(self, files: HeadFiles, config: HeadSizes, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        assert isinstance(config, MedusaConfig), "read_config returns one"
        names, hidden = Names(files, _unprefixed(files), {}), config.hidden_size
        for head in range(config.heads):
            for block in range(config.blocks):
                linear = f"{head}.{block}.linear"
                names.take(f"{linear}.weight", f"{linear}.weight", (hidden, hidden))
                names.take(f"{linear}.bias", f"{linear}.bias", (hidden,))
            rows = f"{head}.{config.blocks}.weight"
            if rows in names.remaining:
                names.pad(rows, config.vocab_size)
            names.take(rows, rows, (config.vocab_size, hidden))
        return Reading(config, names.finish()), []

    def write(self, reading: Reading, engine: ServingEngine) -> WrittenHead:
        config = reading.config
        if not isinstance(config, MedusaConfig):
            raise ValueError("an EAGLE head needs the official layout, not Medusa's")
        if engine.name != "official":
            raise ValueError(
                f"{engine.name} can't read Medusa heads (vLLM dropped them in 0.33): use --to official, or train an "
                f"EAGLE-3 head"
            )
        notes: tuple[str, ...] = ()
        tensors = dict(reading.weights)
        if reading.draft_vocab is not None:
            # The layout needs an LM head over all tokens. A zero row gives logit 0, below that of likely tokens.
            for head in range(config.heads):
                name = f"{head}.{config.blocks}.weight"
                rows = torch.zeros(config.vocab_size, config.hidden_size)
                tensors[name] = rows.index_copy(0, reading.draft_vocab.long(), tensors[name].float())
            notes = ("the draft vocabulary is lost: LM head rows of all other tokens are zero",)
        document: dict[str, Any] = {
            "medusa_num_heads": config.heads,
            "medusa_num_layers": config.blocks,
            "base_model_name_or_path": engine.target,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
        }
        return WrittenHead(document, tensors, notes)


def _unprefixed(files: HeadFiles) -> dict[str, Any]:
    return {name.removeprefix("medusa_head."): tensor for name, tensor in files.tensors.items()}
