"""Conventions that an EAGLE head's files leave open: the questions, and the change that each answer makes to a reading.

Owns the labels that users see. `formats.probe` does the measuring, and the format modules read the files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from haast.formats.base import Option, Question, Reading, TargetFacts
from haast.heads.block import BlockConfig
from haast.heads.config import FusedConfig, HeadConfig
from haast.heads.eagle3 import Eagle3Config
from haast.heads.mtp import MtpConfig

_NORMED = {False: "the state", True: "the normed state"}


def conventions(config: Eagle3Config, facts: TargetFacts) -> list[Question]:
    """Questions about an EAGLE-3 head: keys that trainers understand differently, or leave out."""
    residual = config.norm_before_residual
    return [
        _layers_question(config, facts),
        Question.of("residual", "norm_before_residual", [(_NORMED[on], on) for on in (residual, not residual)]),
        *common(config, facts),
        _fed_back(config),
    ]


def mtp_conventions(config: MtpConfig) -> list[Question]:
    """Questions about an MTP head: which states it reads, and in which order."""
    read = {True: "after the final norm", False: "before the final norm"}
    first = config.reads_normed
    swapped = Option("the other order", swapped_inputs)
    return [
        Question.of("state read", "reads_normed", [(read[on], on) for on in (first, not first)]),
        Question("embedding and state", (Option("the producer's order", lambda reading: reading), swapped)),
        _fed_back(config),
    ]


def swapped_inputs(reading: Reading) -> Reading:
    """Let the projections of an MTP head read the state first, then the embedding, or the other way round."""
    weights = {
        name: tensor.roll(tensor.shape[1] // 2, dims=1) if name.endswith("eh_proj.weight") else tensor
        for name, tensor in reading.weights.items()
    }
    return replace(reading, weights=weights)


def _fed_back(config: HeadConfig) -> Question:
    options = [(_NORMED[on], on) for on in (config.norm_output, not config.norm_output)]
    return Question.of("fed back", "norm_output", options)


def block_conventions(config: BlockConfig, facts: TargetFacts, mask_stated: bool) -> list[Question]:
    """Questions about a DFlash or DSpark head; `mask_stated`: whether its files say which slots a slot attends to."""
    anchor, causal = config.sample_from_anchor, config.causal
    drafted = {False: "the token at its own place (DFlash)", True: "the token after it (DSpark)"}
    anchors = [on for on in (anchor, not anchor) if on or config.block_size > 1]
    questions = [
        _layers_question(config, facts),
        Question.of("a slot drafts", "sample_from_anchor", [(drafted[on], on) for on in anchors]),
        *common(config, facts),
    ]
    if not mask_stated:
        attends = {False: "all slots", True: "those before it"}
        questions.append(Question.of("a slot sees", "causal", [(attends[on], on) for on in (causal, not causal)]))
    return [question for question in questions if len(question.options) > 1]


def _layers_question(config: FusedConfig, facts: TargetFacts) -> Question:
    shifted = [tuple(layer + shift for layer in config.layer_ids) for shift in (0, 1, -1)]
    possible = [layers for layers in shifted if layers[0] >= 0 and layers[-1] <= facts.layers]
    return Question.of("layer ids", "layer_ids", [(", ".join(map(str, layers)), layers) for layers in possible])


def common(config: HeadConfig, facts: TargetFacts) -> list[Question]:
    """Questions about every EAGLE head: rotary embedding, and the scale of token embeddings."""
    questions = []
    own, unscaled = config.rope_parameters or {}, {"rope_type": "default"}
    unscaled["rope_theta"] = own.get("rope_theta", 10000.0)
    ropes = [(_rope_label(own), own), (f"the target's, {_rope_label(facts.rope)}", facts.rope)]
    questions.append(Question.of("rope", "rope_parameters", [*ropes, ("without scaling", unscaled)]))
    pairs = Option("interleaved pairs", interleaved)
    questions.append(Question("rope style", (Option("halves (neox)", lambda reading: reading), pairs)))
    if facts.embedding_scale != 1.0 and not config.own_embedding:
        scales = [("as the target's", 1.0), ("the table's rows", 1.0 / facts.embedding_scale)]
        questions.append(Question.of("embedding", "embedding_scale", scales))
    return [question for question in questions if len(question.options) > 1]


def _rope_label(rope: dict[str, Any]) -> str:
    kind = rope.get("rope_type", "default")
    factor = f" by {rope['factor']:g}" if isinstance(rope.get("factor"), int | float) else ""
    return f"base {float(rope.get('rope_theta', 10000.0)):g}" + ("" if kind == "default" else f", {kind}{factor}")


def interleaved(reading: Reading) -> Reading:
    """Convert a head that rotates neighbouring pairs into one that rotates halves, by permuting query and key rows."""
    config = reading.config
    assert isinstance(config, HeadConfig), "Medusa heads have no rotary embedding"
    order = torch.arange(config.head_dim).view(-1, 2).T.flatten()  # even indices, then odd ones
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
    """For layers after the first that have two norms before attention: vLLM uses one of them, SGLang the other."""
    kept = {name: tensor for name, tensor in reading.weights.items() if not _is_later_hidden_norm(name)}
    hidden_norms = {
        name.replace(".hidden_norm.", ".input_layernorm."): tensor
        for name, tensor in reading.weights.items()
        if _is_later_hidden_norm(name)
    }
    options = (
        Option("input_layernorm", lambda reading: reading),
        Option("hidden_norm", lambda reading: replace(reading, weights={**reading.weights, **hidden_norms})),
    )
    return replace(reading, weights=kept), Question("norm of later layers", options)


def _is_later_hidden_norm(name: str) -> bool:
    return name.startswith("more.") and ".hidden_norm." in name


def as_absolute(first: Tensor, absolute: Tensor) -> Any:
    """The change to a reading if `d2t` holds absolute ids: the draft vocabulary, and LM head rows in its order."""
    back = first.argsort().argsort()  # from ascending order to the file's order
    order = absolute.argsort()

    def change(reading: Reading) -> Reading:
        weights = dict(reading.weights)
        for name in ("lm_head.weight", "markov_head.markov_w2.weight"):
            if name in weights:
                weights[name] = weights[name][back][order]
        return replace(reading, weights=weights, draft_vocab=absolute.sort().values)

    return change
