"""Makes a smaller model from the first and last decoder layers of a model, without training.

If a family has no smaller model (SmolLM2-135M-Instruct is the smallest of its family), this one can draft for `haast
bench --small-model DIR`. It shows what is possible without a head and without training.

    python benchmarks/small_model.py --first 8 --last 2 --out small/
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from haast.target.load import DEFAULT_MODEL, load_stock


def cut(model: Any, first: int, last: int) -> Any:
    """Keep only the first `first` and the last `last` layers of a model, in place.

    Raises:
        ValueError: no layer would be left, or the model has fewer layers.
    """
    layers = list(model.model.layers)
    if first < 0 or last < 0 or not 0 < first + last <= len(layers):
        raise ValueError(f"first={first} and last={last} are not possible: give 1 to {len(layers)} layers in total")
    kept = layers[:first] + (layers[-last:] if last else [])
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:first] + model.config.layer_types[len(layers) - last :]
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--first", type=int, default=8)
    parser.add_argument("--last", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = load_stock(arguments.model)
    cut(model, arguments.first, arguments.last).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"{arguments.out}: {arguments.first + arguments.last} layers")


if __name__ == "__main__":
    main()
