"""Heads that SpecForge (lmsys) trains: EAGLE-3 tensors with both vocabulary maps.

SpecForge's `norm_output` differs from that of the serving engines: it is whether states are normed before the LM head.
The state that is fed back is never normed. Layer ids in `eagle_config` index layer outputs.
"""

from __future__ import annotations

from dataclasses import replace

from haast.formats.base import Format, HeadFiles, Option, Question, Reading, TargetFacts
from haast.formats.detect import plain_names
from haast.formats.layout import eagle3_config, eagle3_reading
from haast.formats.official import config_layers
from haast.heads.config import HeadSizes
from haast.heads.eagle3 import Eagle3Config


class SpecForge(Format):
    """See the module docstring."""

    name = "SpecForge"
    kinds = ("eagle3",)

    def detect(self, kind: str, files: HeadFiles) -> bool:
        document = files.document
        nested = document.get("eagle_config") or {}
        named = document.get("architectures") == ["LlamaForCausalLMEagle3"] and "t2d" in files.tensors
        plain = "use_aux_hidden_state" not in nested and not {"norm_before_fc", "norm_before_residual"} & set(document)
        return kind in self.kinds and named and plain and any(name.startswith("midlayer.") for name in files.tensors)

    def read_config(self, files: HeadFiles, facts: TargetFacts) -> HeadSizes:
        return eagle3_config(files, files.document, facts, config_layers(files.document))

    def map_names(self, files: HeadFiles, config: HeadSizes, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        assert isinstance(config, Eagle3Config), "read_config returns one"
        reading, questions = eagle3_reading(files, config, facts)
        if files.document.get("norm_output") is False and "norm.weight" in plain_names(files.tensors):
            norm = {"norm.weight": reading.weights["norm.weight"]}
            weights = {name: tensor for name, tensor in reading.weights.items() if name not in norm}
            reading = replace(reading.with_config(last_norm=False), weights=weights)
            normed = Option(
                "yes", lambda each: replace(each.with_config(last_norm=True), weights={**each.weights, **norm})
            )
            questions.append(Question("norm before the LM head", (Option("no", lambda each: each), normed)))
        return reading, questions
