"""Heads that NVIDIA's ModelOpt exports: `layers.0.*`, `eagle_config`, no `t2d`, no embedding.

Layer ids index layer outputs. The export may have added a YaRN `rope_scaling` that training did not use.
"""

from __future__ import annotations

from haast.formats.base import Format, HeadFiles, Question, Reading, TargetFacts
from haast.formats.layout import eagle3_config, eagle3_reading
from haast.formats.official import config_flag, config_layers
from haast.heads.config import HeadSizes
from haast.heads.eagle3 import Eagle3Config


class ModelOpt(Format):
    """See the module docstring."""

    name = "ModelOpt"
    kinds = ("eagle3",)

    def detect(self, kind: str, files: HeadFiles) -> bool:
        nested = files.document.get("eagle_config")
        return kind in self.kinds and isinstance(nested, dict) and "use_aux_hidden_state" in nested

    def read_config(self, files: HeadFiles, facts: TargetFacts) -> HeadSizes:
        document = files.document
        layers = config_layers(document) or [2, facts.layers // 2, facts.layers - 3]
        nested = document["eagle_config"]
        for key, wanted in (("use_aux_hidden_state", True), ("use_input_layernorm_in_first_layer", True)):
            if nested.get(key, wanted) not in (wanted, None):
                raise files.error(f"eagle_config.{key} is {nested[key]!r}", f"use a head with {key} {wanted!r}")
        return eagle3_config(files, document, facts, layers, norm_output=config_flag(document, "norm_output"))

    def map_names(self, files: HeadFiles, config: HeadSizes, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        assert isinstance(config, Eagle3Config), "read_config returns one"
        return eagle3_reading(files, config, facts)
