"""Every causal LM class of transformers, built tiny with random weights: does Haast say what stock `generate` says?

    python tests/zoo.py --json results/zoo.json

A class says the same text, or is refused by its name, or no tiny one could be built (`NOT_BUILT` says why). Anything
else is a bug. So are models of images and text, given text alone. Sizes are found by what fields a configuration has;
what that leaves open is in `MORE`. `python benchmarks/readme.py` writes docs/models.md from the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from fakes import RandomTrees, head_for
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from zoo_sizes import BOTH, KINDS, MORE, NOT_BUILT, OWN_CONFIG, SIZES, SWITCHES, VOCAB

import haast
from haast.bench.report import machine
from haast.drafters.tree_shape import DraftShape
from haast.errors import HeadMismatchError, UnsupportedModelError

PROMPT = (5, 6, 7, 9, 5, 6, 7, 9, 5)
NEW = 12
WANDERS = 4  # different tokens that a text should have: one that repeats itself would show little
APART = 2e-3  # logits at most, relative to their spread
_SEEDS = 5  # tried until a text wanders
IMAGES = "+images"  # ends the name of a type of model of images and text
_OF_IMAGES = {f"{kind}{IMAGES}": name for kind, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()}
_TEXT: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# Type -> class; the class of a type of images and text where it is not that of its causal LM.
CLASSES = {**_TEXT, **{kind: name for kind, name in _OF_IMAGES.items() if _TEXT.get(kind.removesuffix(IMAGES)) != name}}

_REASONS = {
    "is not causal": "not causal: its logits at a token depend on later tokens",
    "can't take a tree": "its forward fails when it is given a 4-D mask, positions and Haast's cache",
    "can't be drafted for": "with Haast's masks, positions and cache its logits are not those of its own forward",
    "can't verify a tree": "the logits of a tree node are not those of its path alone",
    "carries a recurrent state": "hybrid or recurrent: a state that can't be gathered by tree path",
}
_HYBRID = ("conv", "hybrid", "linear_attention")  # kinds of layers


def fields_of(kind: type) -> set[str]:
    """The settings that a configuration class takes."""
    if dataclasses.is_dataclass(kind):
        return {each.name for each in dataclasses.fields(kind)}
    return set(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]  # older transformers


def tiny_config(kind: Any, default: Any = None, more: Mapping[str, Any] | None = None) -> Any:
    """A tiny configuration of a class; `default` is an instance with its usual settings, `more` goes over all."""
    default = kind() if default is None else default
    names = fields_of(kind)
    given: dict[str, Any] = {
        name: bool(size) if name in SWITCHES else size for name, size in SIZES.items() if name in names
    }
    for name in KINDS:
        if name in names and getattr(default, name, None):
            kinds = list(dict.fromkeys(getattr(default, name)))
            if kinds == ["full_attention"] and "sliding_window" in names:
                kinds = BOTH["layer_types"]
            given[name] = kinds if len(kinds) > 1 else 2 * kinds
            given["num_hidden_layers"] = len(given[name])
    given = {**given, **MORE.get(kind.model_type, {}), **(more or {})}
    for name in kind.sub_configs:
        inner = getattr(default, name, None)
        if inner is not None:
            given[name] = tiny_config(type(inner), inner, given.get(name))
    return kind(**given)


def build(kind: str, decodes: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model of a type, with `is_decoder=True` if it `decodes`: the same weights for the same seed."""
    model_class: Any = getattr(transformers, CLASSES[kind])
    config = tiny_config(model_class.config_class if kind in OWN_CONFIG else config_class(kind))
    if decodes:
        config.is_decoder = True
    auto: Any = AutoModelForImageTextToText if kind.endswith(IMAGES) else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = model_class(config) if kind in OWN_CONFIG else auto.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(0.3 * noise)
            elif parameter.is_floating_point():  # biases and norms, which begin at zero and one
                parameter.add_(0.1 * noise)
    model.generation_config = GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]  # nothing ends a text
    return model.to(dtype).eval()


def config_class(kind: str) -> Any:
    """The configuration's class of a type."""
    return CONFIG_MAPPING[kind.removesuffix(IMAGES)]


def may_decode(kind: str) -> bool:
    """Whether models of a type are causal only if their configuration says so."""
    names = fields_of(config_class(kind))
    return not kind.endswith(IMAGES) and "is_decoder" in names and "is_decoder" not in MORE.get(kind, {})


def said(model: Any, **more: Any) -> tuple[list[int], Tensor]:
    """The greedy text, and the logits (tokens, vocab) that it was chosen by."""
    ids = torch.tensor([PROMPT])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW}
    output = model.generate(**given, output_logits=True, return_dict_in_generate=True, **more)
    return output.sequences[0, len(PROMPT) :].tolist(), torch.cat(output.logits)


def outcome(kind: str, decodes: bool = False) -> dict[str, Any]:
    """What came of one type: "same text", "refused", "not built", or what must not be: "other text", "error"."""
    row: dict[str, Any] = {"type": kind, "class": CLASSES[kind], "is_decoder": decodes}
    for seed in range(_SEEDS):
        try:
            model = build(kind, decodes, seed)
        except Exception as error:
            return {**row, "outcome": "not built", "why": NOT_BUILT.get(kind, _line(error))}
        try:
            text, logits = said(model)
        except Exception as error:  # what draws or speaks can't go by text alone
            return {**row, **_compared(model, None), "stock": _line(error)}
        if len(set(text)) >= WANDERS:
            break
    return {**row, **_compared(model, (text, logits)), "distinct": len(set(text))}


def _compared(model: Any, stock: tuple[list[int], Tensor] | None) -> dict[str, Any]:
    """`stock` is what stock `generate` says and by which logits; None where it can't say anything."""
    try:
        decoders = dict(_decoders(model, [] if stock is None else stock[0]))
    except UnsupportedModelError as error:
        return {"outcome": "refused" if stock is None or _refused_in_call(model) else "error", "why": _line(error)}
    except Exception as error:
        return {"outcome": "error", "why": _line(error)}
    if stock is None:
        return {"outcome": "not built", "why": "stock generate can't run it, given text alone"}
    text, logits = stock
    taus = dict[str, float]()
    for name, decoder in decoders.items():
        try:
            mine, by = said(model, custom_generate=decoder)
        except Exception as error:
            return {"outcome": "error", "why": f"with {name}: {_line(error)}"}
        apart = float((by - logits).abs().max() / logits.std())
        if mine != text or not apart <= APART:
            why = f"with {name}: {mine} instead of {text}, logits {apart:.1g} of their spread"
            return {"outcome": "other text", "why": why}
        taus[name] = round(decoder.stats.tau, 2)
    return {"outcome": "same text", "tau": taus}


def _decoders(model: Any, text: Sequence[int]) -> Iterator[tuple[str, haast.Decoder]]:
    """Decoders by the name of their drafts; without "head" if it refuses the model. Most nodes of trees are wrong."""
    trees = RandomTrees(14, 3, [[*PROMPT, *text]], rate=0.6, vocab=VOCAB)
    yield "trees", haast.Decoder(model, drafter=trees)
    yield "suffix", haast.Decoder(drafter="suffix")
    yield "lookahead", haast.Decoder(drafter="lookahead")
    head = head_for(model.config.get_text_config())
    with contextlib.suppress(HeadMismatchError):
        yield "head", haast.Decoder(model, head=head, drafter="eagle", shape=DraftShape(depth=3, nodes=12))


def _refused_in_call(model: Any) -> bool:
    """Whether `generate` refuses the model too, where nothing has been checked before."""
    try:
        said(model, custom_generate=haast.Decoder(drafter="suffix"))
    except UnsupportedModelError:
        return True
    return False


def _line(error: Exception) -> str:
    """An error in one line. A refusal is its message; others may be pages, and name files."""
    if type(error) is UnsupportedModelError:
        return " ".join(str(error).split())
    return re.sub(r"/\S+/", "", " ".join(f"{type(error).__name__}: {error}".split()))[:200]


def survey(kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Types in alphabetical order, those that may decode also as decoders."""
    rows = list[dict[str, Any]]()
    for kind in sorted(kinds):
        rows += [outcome(kind, decodes) for decodes in ((False, True) if may_decode(kind) else (False,))]
        print(f"{kind}: {', '.join(row['outcome'] for row in rows if row['type'] == kind)}", flush=True)
    for row in rows:
        if row["outcome"] == "refused":
            row["reason"] = _reason(row)
    return rows


def best(rows: Sequence[Mapping[str, Any]], images: bool = False) -> list[dict[str, Any]]:
    """One row per type of causal LMs, or of images and text: that with is_decoder=True where it says the same text."""
    chosen: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["type"].endswith(IMAGES) == images and (row["outcome"] == "same text" or not row["is_decoder"]):
            kind = row["type"]
            if kind not in chosen or chosen[kind]["outcome"] != "same text":
                chosen[kind] = {**row, "type": kind.removesuffix(IMAGES)}
    return list(chosen.values())


def counts(rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """How many came to what."""
    return Counter(row["outcome"] for row in rows)


def _reason(row: Mapping[str, Any]) -> str:
    """Why a type is refused, without what was measured and what to do instead."""
    message = str(row["why"]).removeprefix(row["class"]).partition(";")[0].strip()
    if message.startswith("has layers of kind") and any(f"'{kind}" in message for kind in _HYBRID):
        return _REASONS["carries a recurrent state"]
    return next((reason for begin, reason in _REASONS.items() if message.startswith(begin)), message)


def main(words: Sequence[str]) -> int:
    """Returns 1 where a class says another text or fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("kinds", nargs="*", help="types; all, if none is given")
    given = parser.parse_args(words)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    rows = survey(given.kinds or [*CLASSES])
    types, images = best(rows), best(rows, images=True)
    held = {"kind": "zoo", "environment": machine(), "types": types, "images": images}
    given.json.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    print(dict(counts(types)), dict(counts(images)))
    return int(any(row["outcome"] in ("other text", "error") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
