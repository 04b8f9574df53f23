"""What EAGLE heads' files leave open: the questions, and what each answer makes of a reading.

Owns the words that people see and the changes behind them. Measures nothing (`formats.probe` does), and reads no file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from haast.formats.base import Option, Question, Reading, TargetFacts
from haast.heads.config import HeadConfig
from haast.heads.eagle3 import Eagle3Config


def conventions(config: Eagle3Config, facts: TargetFacts) -> list[Question]:
    """What an EAGLE-3 head's files say in words that producers use differently, or not at all."""
    ids = config.layer_ids
    shifted = [tuple(each + shift for each in ids) for shift in (0, 1, -1)]
    possible = [each for each in shifted if each[0] >= 0 and each[-1] <= facts.layers]
    residual = config.norm_before_residual
    words = {False: "the state", True: "the normed state"}
    return [
        Question.of("layer ids", "layer_ids", [(", ".join(map(str, each)), each) for each in possible]),
        Question.of("residual", "norm_before_residual", [(words[each], each) for each in (residual, not residual)]),
        *common(config, facts),
        Question.of("fed back", "norm_output", [(words[e], e) for e in (config.norm_output, not config.norm_output)]),
    ]


def common(config: HeadConfig, facts: TargetFacts) -> list[Question]:
    """What every EAGLE head leaves open: rotation, and how embeddings are scaled."""
    questions = []
    own, plain = config.rope_parameters or {}, {"rope_type": "default"}
    plain["rope_theta"] = own.get("rope_theta", 10000.0)
    ropes = [(_rope_words(own), own), (f"the target's, {_rope_words(facts.rope)}", facts.rope)]
    questions.append(Question.of("rope", "rope_parameters", [*ropes, ("without scaling", plain)]))
    rotate = Option("interleaved pairs", interleaved)
    questions.append(Question("rope style", (Option("halves (neox)", lambda reading: reading), rotate)))
    if facts.embedding_scale != 1.0 and not config.own_embedding:
        scales = [("as the target's", 1.0), ("the table's rows", 1.0 / facts.embedding_scale)]
        questions.append(Question.of("embedding", "embedding_scale", scales))
    return [question for question in questions if len(question.options) > 1]


def _rope_words(rope: dict[str, Any]) -> str:
    kind = rope.get("rope_type", "default")
    factor = f" by {rope['factor']:g}" if isinstance(rope.get("factor"), int | float) else ""
    return f"base {float(rope.get('rope_theta', 10000.0)):g}" + ("" if kind == "default" else f", {kind}{factor}")


def interleaved(reading: Reading) -> Reading:
    """A head whose rotation turns neighbouring pairs, as one that turns halves: query and key rows in that order."""
    config = reading.config
    assert isinstance(config, HeadConfig), "Medusa heads rotate nothing"
    order = torch.arange(config.head_dim).view(-1, 2).T.flatten()  # even places, then odd ones
    weights = {}
    for name, tensor in reading.weights.items():
        part = name.split(".")[-2:]
        if part[0] in ("q_proj", "k_proj"):
            blocks = tensor.view(-1, config.head_dim, *tensor.shape[1:])
            tensor = blocks[:, order].reshape(tensor.shape)
        elif part[0] in ("q_norm", "k_norm"):
            tensor = tensor[order]
        weights[name] = tensor
    return replace(reading, weights=weights)


def later_norms(reading: Reading) -> tuple[Reading, Question]:
    """Layers after the first with two norms before attention: vLLM uses one of them, SGLang the other."""
    theirs = {name: tensor for name, tensor in reading.weights.items() if not _is_later_hidden(name)}
    other = {
        name.replace(".hidden_norm.", ".input_layernorm."): tensor
        for name, tensor in reading.weights.items()
        if _is_later_hidden(name)
    }
    options = (
        Option("input_layernorm", lambda each: each),
        Option("hidden_norm", lambda each: replace(each, weights={**each.weights, **other})),
    )
    return replace(reading, weights=theirs), Question("norm of later layers", options)


def _is_later_hidden(name: str) -> bool:
    return name.startswith("more.") and ".hidden_norm." in name


def as_absolute(first: Tensor, absolute: Tensor) -> Any:
    """A change that names the drafted tokens anew, and puts the LM head's rows into their order."""
    back = first.argsort().argsort()  # from ascending to the file's order
    order = absolute.argsort()

    def change(reading: Reading) -> Reading:
        weights = dict(reading.weights)
        if not reading.shares_lm_head:
            weights["lm_head.weight"] = weights["lm_head.weight"][back][order]
        return replace(reading, weights=weights, draft_vocab=absolute.sort().values)

    return change
