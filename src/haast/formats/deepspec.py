"""DeepSeek's DeepSpec heads of EAGLE-3 type: Qwen3 layers, five layers of the target, a whole vocabulary of their own.

`target_layer_ids` count outputs of layers, -1 the embedding. Every layer reads the embedding beside the state.
"""

from __future__ import annotations

from haast.formats.base import Format, HeadFiles, Question, Reading, TargetFacts
from haast.formats.layout import eagle3_config, eagle3_reading
from haast.formats.official import named_layers, says
from haast.heads.config import HeadSizes
from haast.heads.eagle3 import Eagle3Config


class DeepSpec(Format):
    """See the module docstring."""

    name = "DeepSpec"
    kinds = ("eagle3",)

    def detect(self, kind: str, files: HeadFiles) -> bool:
        named = files.document.get("architectures") or [""]
        return kind in self.kinds and (str(named[0]).endswith("Eagle3Model") or "target_layer_ids" in files.document)

    def read_config(self, files: HeadFiles, facts: TargetFacts) -> HeadSizes:
        document = files.document
        everywhere = "layers.1.hidden_norm.weight" in files.tensors
        conventions = {key: says(document, key) for key in ("norm_before_residual", "norm_output")}
        layers = named_layers(document)
        return eagle3_config(files, document, facts, layers, embedding_everywhere=everywhere, **conventions)

    def map_names(self, files: HeadFiles, config: HeadSizes, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        assert isinstance(config, Eagle3Config), "read_config gives one"
        return eagle3_reading(files, config, facts)
