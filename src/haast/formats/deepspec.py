"""DeepSeek's DeepSpec heads of EAGLE-3 type: Qwen3 layers, five target layers, an LM head over the whole vocabulary.

`target_layer_ids` index layer outputs, with -1 for the embedding. Every layer reads the embedding next to the state.
"""

from __future__ import annotations

from haast.formats.base import Format, HeadFiles, Question, Reading, TargetFacts
from haast.formats.layout import eagle3_config, eagle3_reading
from haast.formats.official import config_flag, config_layers
from haast.heads.config import HeadSizes
from haast.heads.eagle3 import Eagle3Config


class DeepSpec(Format):
    """See the module docstring."""

    name = "DeepSpec"
    kinds = ("eagle3",)

    def detect(self, kind: str, files: HeadFiles) -> bool:
        names = files.document.get("architectures") or [""]
        return kind in self.kinds and (str(names[0]).endswith("Eagle3Model") or "target_layer_ids" in files.document)

    def read_config(self, files: HeadFiles, facts: TargetFacts) -> HeadSizes:
        document = files.document
        everywhere = "layers.1.hidden_norm.weight" in files.tensors
        conventions = {key: config_flag(document, key) for key in ("norm_before_residual", "norm_output")}
        layers = config_layers(document)
        return eagle3_config(files, document, facts, layers, embedding_everywhere=everywhere, **conventions)

    def map_names(self, files: HeadFiles, config: HeadSizes, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        assert isinstance(config, Eagle3Config), "read_config returns one"
        return eagle3_reading(files, config, facts)
