"""Reads what the layouts of all EAGLE heads share: sizes from tensor shapes, and tensors under Haast's names.

Owns the reading of Llama- and Qwen3-type layers, `fc`, draft vocabularies and RoPE settings, and collects the open
questions. The format modules (`formats.official`, ...) own what differs between trainers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from haast.formats.base import HeadFiles, Option, Question, Reading, TargetFacts
from haast.formats.conventions import as_absolute, common, conventions, later_norms
from haast.formats.detect import plain_names
from haast.formats.keys import SIZE_ERRORS
from haast.heads.config import FusedConfig, HeadConfig
from haast.heads.eagle3 import Eagle3Config
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig

# Tensors that trainers save in addition to the head: buffers, and parts of the target.
_IGNORED = ("rotary_emb.", "verifier_lm_head.", "verifier_norm.")
MASKS = ("mask_token_id", "ptd_token_id", "pard_token")  # trainers' keys for a P-EAGLE head's mask token
_AUX_NORMS = {"aux_norm_low": "fc_norm.0", "aux_norm_mid": "fc_norm.1", "aux_norm_high": "fc_norm.2"}
_PADDING = 8  # up to 1/8 of a vocabulary may be padding
_LAYER = re.compile(r"layers\.(\d{1,4})\.")


@dataclass
class Names:
    """Moves a head's tensors from the file's names to Haast's.

    Attributes:
        files: the head's files.
        remaining: tensors not used yet, under the plain names of the files; `finish` refuses any that are left.
        weights: the tensors moved so far, under Haast's names.
    """

    files: HeadFiles
    remaining: dict[str, Tensor]
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, files: HeadFiles) -> Names:
        """Start with all tensors of the files, except those that belong to no head."""
        remaining = {}
        for name, tensor in plain_names(files.tensors).items():
            stem = name.split(".")[0]
            if not any(part in name for part in _IGNORED):
                remaining[name.replace(stem, _AUX_NORMS[stem], 1) if stem in _AUX_NORMS else name] = tensor
        return cls(files, remaining, {})

    def take(self, theirs: str, ours: str, shape: tuple[int, ...]) -> None:
        """Move one tensor. Raises HeadMismatchError if it is missing, or has another shape or an integer dtype."""
        tensor = self.remaining.pop(theirs, None)
        if tensor is None:
            raise self.files.error(f"the tensor {theirs} is missing", "fetch the head again")
        if tuple(tensor.shape) != shape:
            raise self.files.error(
                f"{theirs} is {tuple(tensor.shape)}, but the other tensors and config.json imply {shape}",
                "fetch the head again, or correct config.json",
            )
        if not tensor.is_floating_point():
            raise self.files.error(f"{theirs} is {tensor.dtype}, expected floating point", "fetch the head again")
        self.weights[ours] = tensor if tensor.dtype is torch.float64 else tensor.float()

    def layer(self, theirs: str, ours: str, config: HeadConfig, inputs: int, norms: Sequence[str]) -> None:
        """Move a decoder layer whose q, k and v projections have `inputs` input features."""
        hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        rows = {"q": config.num_attention_heads * dim, "k": config.num_key_value_heads * dim}
        rows["v"] = rows["k"]
        for name, count in rows.items():
            self.take(f"{theirs}self_attn.{name}_proj.weight", f"{ours}self_attn.{name}_proj.weight", (count, inputs))
            if config.qkv_bias:
                self.take(f"{theirs}self_attn.{name}_proj.bias", f"{ours}self_attn.{name}_proj.bias", (count,))
        self.take(f"{theirs}self_attn.o_proj.weight", f"{ours}self_attn.o_proj.weight", (hidden, rows["q"]))
        if config.o_bias:
            self.take(f"{theirs}self_attn.o_proj.bias", f"{ours}self_attn.o_proj.bias", (hidden,))
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            self.take(f"{theirs}self_attn.{name}.weight", f"{ours}self_attn.{name}.weight", (dim,))
        for name in ("gate", "up"):
            self.take(f"{theirs}mlp.{name}_proj.weight", f"{ours}mlp.{name}_proj.weight", (inner, hidden))
        self.take(f"{theirs}mlp.down_proj.weight", f"{ours}mlp.down_proj.weight", (hidden, inner))
        for name in norms:
            self.take(f"{theirs}{name}.weight", f"{ours}{name}.weight", (hidden,))

    def embedding(self, config: HeadConfig) -> None:
        """Move the head's own embedding table, padded to the target's number of rows."""
        if config.own_embedding:
            self.pad("embed_tokens.weight", config.vocab_size)
            self.take("embed_tokens.weight", "embed_tokens.weight", (config.vocab_size, config.hidden_size))

    def pad(self, theirs: str, rows: int) -> None:
        """Cut or pad a table with one row per target token to `rows` rows."""
        self.remaining[theirs] = with_rows(self.files, theirs, self.remaining[theirs], rows)

    def finish(self) -> dict[str, Tensor]:
        """The tensors under Haast's names. Raises HeadMismatchError if a tensor was not used."""
        if self.remaining:
            more = f" and {len(self.remaining) - 6} more" if len(self.remaining) > 6 else ""
            raise self.files.error(
                f"Haast does not know these tensors of the head: {', '.join(sorted(self.remaining)[:6])}{more}",
                "use another head, or report which trainer wrote this one",
            )
        return self.weights


def with_rows(files: HeadFiles, name: str, table: Tensor, rows: int) -> Tensor:
    """Cut or zero-pad a table (n, width) to `rows` rows; the difference is vocabulary padding that no token uses.

    Raises HeadMismatchError if n differs so much that the table must belong to another tokenizer.
    """
    if table.dim() != 2 or abs(len(table) - rows) > rows // _PADDING:
        raise files.error(
            f"{name} is {tuple(table.shape)}, the target has {rows} tokens", "use a head for this target's tokenizer"
        )
    if len(table) >= rows:
        return table[:rows]
    return torch.cat([table, table.new_zeros(rows - len(table), *table.shape[1:])])


def rope_of_document(document: dict[str, Any]) -> dict[str, Any] | None:
    """RoPE parameters of a head's config.json, from `rope_parameters` or the older keys; None if it has neither."""
    parameters = document.get("rope_parameters")
    if isinstance(parameters, dict):
        if "rope_theta" in parameters:
            return dict(parameters)
        if isinstance(parameters.get("full_attention"), dict):
            return dict(parameters["full_attention"])
    theta, scaling = document.get("rope_theta"), document.get("rope_scaling")
    if theta is None and not scaling:
        return None
    rest = dict(scaling) if isinstance(scaling, dict) else {}
    kind = rest.pop("type", None)
    base = 10000.0 if theta is None else float(theta)
    return {"rope_type": rest.pop("rope_type", kind or "default"), "rope_theta": base, **rest}


def matrix(files: HeadFiles, tensors: dict[str, Tensor], name: str) -> Tensor:
    """The tensor `name`. Raises HeadMismatchError if it is missing, or not a matrix."""
    tensor = tensors.get(name)
    if tensor is None or tensor.dim() != 2:
        problem = "is missing" if tensor is None else f"is {tuple(tensor.shape)}, expected a matrix"
        raise files.error(f"{name} {problem}", "fetch the head again; Haast knows Llama and Qwen3 layers")
    return tensor


def sizes(files: HeadFiles, document: dict[str, Any], facts: TargetFacts) -> dict[str, Any]:
    """The arguments of `HeadConfig`: from tensor shapes where possible, the others from config.json."""
    tensors = plain_names(files.tensors)
    output, gate, key = (
        matrix(files, tensors, f"layers.0.{name}.weight")
        for name in ("self_attn.o_proj", "mlp.gate_proj", "self_attn.k_proj")
    )
    heads: Any = document.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        raise files.error(f"num_attention_heads={heads!r} in config.json is not a positive integer", "correct it")
    hidden, width = output.shape
    norm = tensors.get("layers.0.self_attn.q_norm.weight")
    if norm is not None and norm.dim() != 1:
        raise files.error(f"layers.0.self_attn.q_norm.weight is {tuple(norm.shape)}", "fetch the head again")
    dim = len(norm) if norm is not None else int(document.get("head_dim") or 0) or int(width) // heads
    keys, eps = key.shape[0], document.get("rms_norm_eps")
    if dim < 1 or width % dim or keys % dim or width // dim != heads:
        raise files.error(
            f"layers.0.self_attn.q_proj.weight has {width} rows and k_proj {keys}, which does not match "
            f"num_attention_heads={heads} and head_dim={dim}",
            "correct config.json",
        )
    shapes = {"hidden_size": hidden, "intermediate_size": gate.shape[0], "num_key_value_heads": keys // dim}
    for key_name, size in shapes.items():
        if document.get(key_name) not in (None, size):
            raise files.error(
                f"{key_name} is {document[key_name]} in config.json, but {size} by the tensors", "correct it"
            )
    positions = document.get("max_position_embeddings") or getattr(facts.config, "max_position_embeddings", None)
    return {
        "hidden_size": int(hidden),
        "vocab_size": int(facts.config.vocab_size),
        "intermediate_size": int(gate.shape[0]),
        "num_attention_heads": heads,
        "num_key_value_heads": keys // dim,
        "head_dim": dim,
        "rms_norm_eps": 1e-6 if eps is None else float(eps),
        "hidden_act": str(document.get("hidden_act") or "silu"),
        "max_position_embeddings": int(positions or 4096),
        "rope_parameters": rope_of_document(document) or facts.rope,
        "num_hidden_layers": 1 + max(int(match[1]) for match in map(_LAYER.match, tensors) if match),
        "fc_bias": "fc.bias" in tensors,
        "qkv_bias": "layers.0.self_attn.q_proj.bias" in tensors,
        "o_bias": "layers.0.self_attn.o_proj.bias" in tensors,
        "qk_norm": norm is not None,
        "own_embedding": "embed_tokens.weight" in tensors,
    }


def eagle3_config(
    files: HeadFiles, document: dict[str, Any], facts: TargetFacts, layer_ids: Sequence[int] | None, **more: Any
) -> Eagle3Config:
    """An EAGLE-3 head's configuration.

    `layer_ids` index transformers' `hidden_states`; None takes the default layers. Raises HeadMismatchError.
    """
    tensors = plain_names(files.tensors)
    head, mapping = tensors.get("lm_head.weight"), tensors.get("d2t")
    if "fc.weight" not in tensors:
        raise files.error(
            "fc.weight is missing: the head reads only one layer of the target (use_aux_hidden_state false)",
            "use a head that fuses several layers",
        )
    masks = [key for key in MASKS if isinstance(document.get(key), int)]
    if "mask_hidden" not in tensors and (masks or document.get("speculators_model_type") == "peagle"):
        raise files.error("it is a P-EAGLE head, but the tensor mask_hidden is missing", "fetch the head again")
    fc, output = (matrix(files, tensors, name) for name in ("fc.weight", "layers.0.self_attn.o_proj.weight"))
    for name, tensor, dims in (("lm_head.weight", head, 2), ("d2t", mapping, 1)):
        if tensor is not None and (tensor.dim() != dims or not len(tensor)):
            raise files.error(f"{name} is {tuple(tensor.shape)}, expected {dims} dimensions", "fetch the head again")
    width = int(document.get("target_hidden_size") or output.shape[0])
    ids = tuple(facts.default_layers if layer_ids is None else sorted({int(layer) for layer in layer_ids}))
    if fc.shape[1] != width * len(ids):
        raise files.error(
            f"fc.weight has {fc.shape[1]} inputs, but the {len(ids)} layers {list(ids)} of width {width} give "
            f"{width * len(ids)}",
            "correct the layer ids or target_hidden_size in config.json",
        )
    if ids and not (ids[0] >= 0 and ids[-1] <= facts.layers):
        raise files.error(
            f"the head reads layers {list(ids)}, but the target has only {facts.layers}",
            "use a head that was trained for this target",
        )
    vocab = int(facts.config.vocab_size)
    drafts = len(mapping) if mapping is not None else (len(head) if head is not None else vocab)
    config: Eagle3Config = build_config(
        files,
        Eagle3Config,
        **sizes(files, document, facts),
        layer_ids=ids,
        draft_vocab_size=0 if drafts >= vocab else drafts,
        fc_norm="fc_norm.0.weight" in Names.of(files).remaining,
        input_norm="input_norm.weight" in tensors,
        target_hidden_size=width,
        **more,
    )
    return config


def build_config(files: HeadFiles, kind: type[Any], **arguments: Any) -> Any:
    """A configuration of class `kind`. Raises HeadMismatchError for impossible sizes."""
    try:
        config = kind(**arguments)
        if isinstance(config, HeadConfig):
            LlamaRotaryEmbedding(config.layers())
    except SIZE_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        rope = f" (its RoPE parameters are {arguments['rope_parameters']})" if "rope_parameters" in arguments else ""
        raise files.error(f"the sizes of the head are impossible: {reason}{rope}", "correct config.json") from error
    return config


def eagle3_reading(
    files: HeadFiles, config: Eagle3Config, facts: TargetFacts, logit_scale: float = 1.0
) -> tuple[Reading, list[Question]]:
    """An EAGLE-3 head's tensors under Haast's names, and the open questions."""
    names, hidden = Names.of(files), config.hidden_size
    width = len(config.layer_ids) * config.read_size
    vocab = draft_ids(names, config)
    questions = conventions(config, facts)
    names.take("fc.weight", "fc.weight", (hidden, width))
    if config.fc_bias:
        names.take("fc.bias", "fc.bias", (hidden,))
    for number in range(len(config.layer_ids)) if config.fc_norm else ():
        names.take(f"fc_norm.{number}.weight", f"fc_norm.{number}.weight", (config.read_size,))
    if config.input_norm:
        names.take("input_norm.weight", "input_norm.weight", (width,))
    norms = ["hidden_norm", "input_layernorm", "post_attention_layernorm"]
    names.layer("layers.0.", "midlayer.", config, 2 * hidden, norms)
    two_norms = "layers.1.hidden_norm.weight" in names.remaining and not config.embedding_everywhere
    for number in range(1, config.num_hidden_layers):
        inputs = 2 * hidden if config.embedding_everywhere else hidden
        later = norms if config.embedding_everywhere else norms[two_norms ^ 1 :]
        names.layer(f"layers.{number}.", f"more.{number - 1}.", config, inputs, later)
    if config.last_norm:
        names.take("norm.weight", "norm.weight", (hidden,))
    else:
        names.remaining.pop("norm.weight", None)
    shares = "lm_head.weight" not in names.remaining
    if not shares:
        if vocab is None:
            names.pad("lm_head.weight", config.drafts)
        names.take("lm_head.weight", "lm_head.weight", (config.drafts, hidden))
        head = names.weights["lm_head.weight"]
        names.weights["lm_head.weight"] = (head if logit_scale == 1.0 else head * logit_scale)[vocab_order(vocab)]
    names.embedding(config)
    if config.mask_token_id >= 0:
        names.take("mask_hidden", "mask_hidden", (1, 1, width))
    ids, offsets_question = (None, None) if vocab is None else vocab
    reading = Reading(config, names.finish(), ids if ids is None else ids.sort().values, shares)
    if two_norms:
        reading, norms_question = later_norms(reading)
        questions.append(norms_question)
    if offsets_question is not None:
        questions.append(offsets_question)
    return reading, questions


def vocab_order(vocab: tuple[Tensor, Question | None] | None) -> Any:
    """The index that sorts LM head rows by ascending target id."""
    return slice(None) if vocab is None else vocab[0].argsort()


def draft_ids(names: Names, config: FusedConfig) -> tuple[Tensor, Question | None] | None:
    """The target ids that the head drafts, in the order of its LM head rows, and a question if `d2t` is ambiguous.

    `d2t` holds offsets in every safetensors format and absolute ids in GGUF files. `t2d`, if present, decides.
    """
    d2t, t2d = names.remaining.pop("d2t", None), names.remaining.pop("t2d", None)
    if d2t is None:
        if t2d is not None and config.draft_vocab_size:
            raise names.files.error("of d2t and t2d it has t2d alone", "fetch the head again")
        if config.draft_vocab_size and config.vocab_size - config.drafts > config.vocab_size // _PADDING:
            raise names.files.error(
                f"lm_head.weight has {config.drafts} rows for the target's {config.vocab_size} tokens, and d2t, which "
                f"maps rows to tokens, is missing",
                "fetch the head again, or use one for this target's tokenizer",
            )
        return (torch.arange(config.draft_vocab_size), None) if config.draft_vocab_size else None
    if d2t.dim() != 1 or d2t.is_floating_point() or d2t.is_complex():
        raise names.files.error(
            f"d2t is {tuple(d2t.shape)} of {d2t.dtype}, expected one integer per draft token", "fetch the head again"
        )
    offset, absolute = d2t.long() + torch.arange(len(d2t)), d2t.long()
    listed = None if t2d is None else t2d.bool().nonzero().flatten()
    possible = {}
    for label, ids in (("an offset", offset), ("absolute ids", absolute)):
        inside = int(ids.min()) >= 0 and int(ids.max()) < config.vocab_size and len(set(ids.tolist())) == len(ids)
        if inside and (listed is None or torch.equal(ids.sort().values, listed)):
            possible[label] = ids
    if not possible:
        maps = "d2t does" if listed is None else f"d2t and t2d ({len(listed)} tokens) do"
        raise names.files.error(
            f"{maps} not give a draft vocabulary of {len(d2t)} different tokens below {config.vocab_size}, neither "
            f"with d2t as offsets nor as ids",
            "use a head for this target's tokenizer, or fetch it again",
        )
    (_, first), *others = possible.items()
    if not config.draft_vocab_size:  # d2t lists the whole vocabulary
        return None if torch.equal(first, torch.arange(len(first))) else (first, None)
    question = None
    if others and not torch.equal(first, absolute):
        question = Question(
            "d2t",
            (Option("an offset", lambda reading: reading), Option("absolute ids", as_absolute(first, absolute))),
        )
    return first, question


def eagle1_reading(
    files: HeadFiles, config: FeatExtrapolatorConfig, facts: TargetFacts, names: Names | None = None
) -> tuple[Reading, list[Question]]:
    """An EAGLE-1 or EAGLE-2 head's tensors under Haast's names."""
    names, hidden = names or Names.of(files), config.hidden_size
    names.remaining.pop("lm_head.weight", None)  # some files hold a copy of the target's
    names.take("fc.weight", "fc.weight", (hidden, 2 * hidden))
    if config.fc_bias:
        names.take("fc.bias", "fc.bias", (hidden,))
    for number in range(config.num_hidden_layers):
        norms = ["post_attention_layernorm"]
        if number or config.norms:
            norms.append("input_layernorm")
        names.layer(f"layers.{number}.", f"layers.{number}.", config, hidden, norms)
    for name in ("embedding_norm", "norm") if config.norms else ():
        names.take(f"{name}.weight", f"{name}.weight", (hidden,))
    names.embedding(config)
    questions = common(config, facts)
    if config.norms:
        labels = {False: "the state", True: "the normed state"}
        questions.append(Question.of("fed back", "norm_output", [(labels[on], on) for on in (False, True)]))
    return Reading(config, names.finish()), questions
