"""A smaller model with the tokenizer of another: its first and last decoder layers, untrained.

Where no smaller model of a family exists (SmolLM2-135M-Instruct is the smallest of its own), this is what is left to
draft with as `haast bench --small-model DIR` does. It says how far one gets without a head and without training.

    python benchmarks/small_model.py --first 8 --last 2 --out small/
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from haast.target.load import DEFAULT_MODEL, load_stock


def cut(model: Any, first: int, last: int) -> Any:
    """The model without the layers between its `first` and its `last` ones, in place.

    Raises:
        ValueError: more layers are asked for than there are, or none.
    """
    layers = list(model.model.layers)
    if first < 0 or last < 0 or not 0 < first + last <= len(layers):
        raise ValueError(f"first={first} and last={last} do not fit a model of {len(layers)} layers")
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
