"""Heads that draft a block in one pass: DFlash (z-lab) and DSpark (DeepSpec, speculators, SpecForge, ModelOpt).

The layouts share their tensors (see `haast.heads.block`) and differ in where config.json holds their keys: at the top,
in `dflash_config`, or in speculators' `transformer_layer_config`. What they leave out, and what trainers understand
differently (which token the first slot drafts, how layers are counted), is a question.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from haast.formats.base import Format, HeadFiles, Question, Reading, TargetFacts
from haast.formats.conventions import block_conventions
from haast.formats.detect import plain_names
from haast.formats.layout import Names, build_config, draft_ids, matrix, sizes, vocab_order
from haast.formats.official import config_layers
from haast.formats.speculators import completed_document
from haast.heads.block import BlockConfig
from haast.heads.config import HeadSizes

_NESTED = "dflash_config"
# Values of keys that Haast's block head supports; others change what the head computes.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_swa": (None, False),
    "attention_sink_bias": (None, False),
    "attention_value_scale": (None, 1, 1.0),
    "output_multiplier": (None, 1, 1.0),
    "input_embedding_scale": (None, 1, 1.0),
    "final_logit_softcapping": (None,),
    "rope_is_neox_style": (None, True),
    "markov_head_type": (None, "vanilla", "gated"),
}
_MARKOV, _CONFIDENCE, _MASK = "markov_head.", "confidence_head.proj.", "mask_embedding"
_MASK_FILE = "mask_embedding.pt"  # z-lab: the mask token's embedding, if it is not the target's


class Block(Format):
    """See the module docstring."""

    name = "DFlash/DSpark"
    kinds = ("dflash", "dspark")

    def detect(self, kind: str, files: HeadFiles) -> bool:
        return kind in self.kinds

    def read_config(self, files: HeadFiles, facts: TargetFacts) -> HeadSizes:
        document, files = _document(files), _renamed(files)
        for key, supported in _SUPPORTED.items():
            if document.get(key) not in supported:
                raise files.error(f"{key}={document[key]!r} is not supported in a block head", "use another head")
        if "sliding_attention" in (document.get("layer_types") or ()):
            raise files.error("layer_types has sliding_attention", "use a head with full attention")
        tensors = files.tensors
        fc = matrix(files, tensors, "fc.weight")
        arguments = sizes(files, document, facts)
        width = int(document.get("target_hidden_size") or arguments["hidden_size"])
        markov, confidence = tensors.get(f"{_MARKOV}markov_w2.weight"), tensors.get(f"{_CONFIDENCE}weight")
        rank = 0 if markov is None else matrix(files, tensors, f"{_MARKOV}markov_w2.weight").shape[1]
        config: BlockConfig = build_config(
            files,
            BlockConfig,
            **arguments,
            layer_ids=_layer_ids(files, document, facts, fc.shape[1], width),
            draft_vocab_size=_drafts(tensors, arguments["vocab_size"]),
            target_hidden_size=width,
            mask_token_id=-1 if _MASK in tensors else _key(files, document, "mask_token_id"),
            block_size=_key(files, document, "block_size"),
            sample_from_anchor=bool(document.get("sample_from_anchor", rank > 0)),
            causal=bool(document.get("causal", document.get("is_causal", False))),
            markov_rank=rank,
            markov_kind="gated" if f"{_MARKOV}gate_proj.weight" in tensors else "vanilla",
            confidence=confidence is not None,
            confidence_markov=confidence is not None and confidence.shape[-1] > arguments["hidden_size"],
            own_lm_head="lm_head.weight" in tensors,
        )
        return config

    def map_names(self, files: HeadFiles, config: HeadSizes, facts: TargetFacts) -> tuple[Reading, list[Question]]:
        assert isinstance(config, BlockConfig), "read_config returns one"
        names, hidden = Names.of(_renamed(files)), config.hidden_size
        vocab = draft_ids(names, config)
        names.take("fc.weight", "fc.weight", (hidden, len(config.layer_ids) * config.read_size))
        if config.fc_bias:
            names.take("fc.bias", "fc.bias", (hidden,))
        for name in ("hidden_norm", "norm"):
            names.take(f"{name}.weight", f"{name}.weight", (hidden,))
        for number in range(config.num_hidden_layers):
            layer = f"layers.{number}."
            names.layer(layer, layer, config, hidden, ("input_layernorm", "post_attention_layernorm"))
        if config.mask_token_id < 0:
            names.take(_MASK, _MASK, (1, hidden))
        _take_extras(names, config, padded=vocab is None)
        names.embedding(config)
        ids, offsets_question = (None, None) if vocab is None else vocab
        weights = names.finish()
        for name in ("lm_head.weight", f"{_MARKOV}markov_w2.weight"):
            if name in weights:
                weights[name] = weights[name][vocab_order(vocab)]
        questions = block_conventions(config, facts, "causal" in _document(files) or "is_causal" in _document(files))
        if offsets_question is not None:
            questions.append(offsets_question)
        return Reading(config, weights, ids if ids is None else ids.sort().values), questions


def _take_extras(names: Names, config: BlockConfig, padded: bool) -> None:
    """Move the LM head, Markov head and confidence head; `padded`: draft tokens are the target's, with padding."""
    hidden, rank = config.hidden_size, config.markov_rank
    rows = {"lm_head.weight": hidden} if config.own_lm_head else {}
    rows |= {f"{_MARKOV}markov_w2.weight": rank} if rank else {}
    for name, width in rows.items():
        if padded:
            names.pad(name, config.drafts)
        names.take(name, name, (config.drafts, width))
    if rank:
        first = f"{_MARKOV}markov_w1.weight"
        if first in names.remaining:
            names.pad(first, config.vocab_size)
        names.take(first, first, (config.vocab_size, rank))
    if config.markov_kind == "gated":
        for part, shape in (("weight", (rank, hidden + rank)), ("bias", (rank,))):
            names.take(f"{_MARKOV}gate_proj.{part}", f"{_MARKOV}gate_proj.{part}", shape)
    if config.confidence:
        width = hidden + rank * config.confidence_markov
        for part, shape in (("weight", (1, width)), ("bias", (1,))):
            names.take(f"{_CONFIDENCE}{part}", f"{_CONFIDENCE}{part}", shape)


def _document(files: HeadFiles) -> dict[str, Any]:
    """config.json with the keys of its nested parts at the top."""
    document = completed_document(files)
    nested = document.get(_NESTED)
    return {**document, **nested} if isinstance(nested, dict) else document


def _renamed(files: HeadFiles) -> HeadFiles:
    """The files with DeepSpec's names, and the mask's embedding.

    ModelOpt writes the Markov and confidence heads without their modules' names.
    """
    tensors = dict[str, Tensor]()
    if (files.folder / _MASK_FILE).is_file():
        tensors[_MASK] = _mask_embedding(files)
    for name, tensor in plain_names(files.tensors).items():
        if name.startswith(("markov_w1.", "markov_w2.")):
            name = _MARKOV + name
        elif name.startswith("confidence_proj."):
            name = _CONFIDENCE + name.removeprefix("confidence_proj.")
        tensors[name] = tensor
    return HeadFiles(files.folder, files.document, tensors, files.source, files.notes)


def _mask_embedding(files: HeadFiles) -> Tensor:
    """The embedding (1, hidden) in z-lab's file {mask_token_id, embedding}."""
    try:
        found: Any = torch.load(files.folder / _MASK_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling may raise anything
        raise files.error(f"{_MASK_FILE} can't be read ({type(error).__name__})", "fetch the head again") from error
    embedding = found.get("embedding") if isinstance(found, dict) else None
    if not isinstance(embedding, Tensor) or not bool(torch.isfinite(embedding).all()):
        raise files.error(f"{_MASK_FILE} holds no tensor named embedding, or one that is not finite", "fetch it again")
    return embedding.reshape(1, -1)


def _key(files: HeadFiles, document: dict[str, Any], key: str) -> int:
    value = document.get(key)
    if type(value) is not int or value < 0:
        raise files.error(f"{key}={value!r} in config.json of this block head is not an integer", "add the key")
    return value


def _layer_ids(
    files: HeadFiles, document: dict[str, Any], facts: TargetFacts, inputs: int, width: int
) -> tuple[int, ...]:
    """The HF `hidden_states` indices: those that config.json lists, or DFlash's default for their number."""
    listed, count = config_layers(document), inputs // width
    if listed is None:
        outputs = [facts.layers // 2] if count == 1 else _spread(facts.layers, count)
        listed = [layer + 1 for layer in outputs]
    ids = tuple(sorted(set(listed)))
    if inputs != width * len(ids):
        raise files.error(
            f"fc.weight has {inputs} inputs, but the {len(ids)} layers {list(ids)} of width {width} give "
            f"{width * len(ids)}",
            "correct the layer ids or target_hidden_size in config.json",
        )
    if ids[-1] > facts.layers:
        raise files.error(
            f"the head reads layers {list(ids)}, but the target has only {facts.layers}",
            "use a head that was trained for this target",
        )
    return ids


def _spread(layers: int, count: int) -> list[int]:
    """DFlash's default layers, counted by their outputs."""
    return [round(1 + number * (layers - 4) / (count - 1)) for number in range(count)]


def _drafts(tensors: dict[str, Tensor], vocab: int) -> int:
    """The size of the draft vocabulary; 0 for the target's."""
    for name in ("d2t", "lm_head.weight", f"{_MARKOV}markov_w2.weight"):
        if name in tensors and tensors[name].dim():
            return 0 if len(tensors[name]) >= vocab else len(tensors[name])
    return 0
