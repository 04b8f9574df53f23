"""A format of heads of your own: all in one file, tensors under other names, the sizes in the file's metadata.

python examples/own_format.py my-head out; the written folder is read again, and its drafts are compared bit for bit.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from haast.formats.base import Format, HeadFiles, Question, Reading, ServingEngine, TargetFacts, WrittenHead
from haast.formats.export import export_head
from haast.formats.files import read_tensors
from haast.formats.opened import register
from haast.heads.checkpoint import load_head
from haast.heads.config import HeadSizes
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig
from haast.target.load import DEFAULT_MODEL, read_config


class OneFile(Format):
    """`one.safetensors`: `layers/0/...` for `layers.0...`, and the ids of the draft vocabulary in `vocabulary`."""

    name, kinds, file = "one-file", ("eagle",), "one.safetensors"

    def read_files(self, path: Path, source: str) -> HeadFiles | None:
        if not (path / self.file).is_file():
            return None  # other formats read it
        tensors = {name.replace("/", "."): tensor for name, tensor in read_tensors(path / self.file).items()}
        sizes = json.loads(safe_open(path / self.file, "pt").metadata()[self.name])
        return HeadFiles(path, {self.name: sizes}, tensors, source)

    def write_files(self, folder: Path, written: WrittenHead, dtype: torch.dtype) -> bool:
        tensors = {name.replace(".", "/"): tensor for name, tensor in written.tensors.items()}
        save_file(tensors, folder / self.file, {self.name: json.dumps(written.document[self.name])})
        return True

    def detect(self, kind: str, files: HeadFiles) -> bool:
        return self.name in files.document  # false for the files of all others

    def read_config(self, files: HeadFiles, facts: TargetFacts) -> HeadSizes:
        return FeatExtrapolatorConfig(**files.document[self.name])

    def map_names(self, files: HeadFiles, config: HeadSizes, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        weights = dict(files.tensors)
        return Reading(config, weights, weights.pop("vocabulary", None)), []  # nothing is open, nothing is measured

    def write(self, reading: Reading, engine: ServingEngine) -> WrittenHead:
        tensors = {**reading.weights, "vocabulary": reading.draft_vocab}
        return WrittenHead({self.name: vars(reading.config)}, {k: v for k, v in tensors.items() if v is not None})


register(OneFile())
if __name__ == "__main__":
    head, out = load_head(Path(sys.argv[1])), Path(sys.argv[2])
    print(export_head(head, OneFile.name, DEFAULT_MODEL, read_config(DEFAULT_MODEL), out).serve)
