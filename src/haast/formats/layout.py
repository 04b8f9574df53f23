"""What the layouts of EAGLE heads have in common, whoever wrote them: sizes read off the tensors, one list of names.

Owns the reading of Llama- and Qwen3-type layers, of `fc`, of vocabularies and of rotary settings, and the questions
that every EAGLE head leaves open. A family (`formats.official`, ...) says what is special about its own.
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
from haast.formats.keys import NO_SIZES
from haast.heads.config import HeadConfig
from haast.heads.eagle3 import Eagle3Config
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig

# What trainers save beside a head, and no head has: buffers, and parts of the target.
_IGNORED = ("rotary_emb.", "verifier_lm_head.", "verifier_norm.")
MASKS = ("mask_token_id", "ptd_token_id", "pard_token")  # by producer, the key of a P-EAGLE head's mask token
_AUX_NORMS = {"aux_norm_low": "fc_norm.0", "aux_norm_mid": "fc_norm.1", "aux_norm_high": "fc_norm.2"}
_PADDING = 8  # a vocabulary's padding is less than this part of it
_LAYER = re.compile(r"layers\.(\d{1,4})\.")


@dataclass
class Names:
    """A head's tensors while they are given Haast's names; what is left at the end is refused."""

    files: HeadFiles
    left: dict[str, Tensor]
    taken: dict[str, Tensor]

    @classmethod
    def of(cls, files: HeadFiles) -> Names:
        """All tensors of the files, by plain names."""
        left = {}
        for name, tensor in plain_names(files.tensors).items():
            stem = name.split(".")[0]
            if not any(part in name for part in _IGNORED):
                left[name.replace(stem, _AUX_NORMS[stem], 1) if stem in _AUX_NORMS else name] = tensor
        return cls(files, left, {})

    def take(self, theirs: str, ours: str, shape: tuple[int, ...]) -> None:
        """Move one tensor. Raises HeadMismatchError where it is missing or of another shape."""
        tensor = self.left.pop(theirs, None)
        if tensor is None:
            raise self.files.wrong(f"the tensor {theirs} is missing", "fetch the head again")
        if tuple(tensor.shape) != shape:
            raise self.files.wrong(
                f"{theirs} is {tuple(tensor.shape)}, {shape} is expected of the other tensors and config.json",
                "fetch the head again, or correct config.json",
            )
        if not tensor.is_floating_point():
            raise self.files.wrong(f"{theirs} is {tensor.dtype}, which no weights are", "fetch the head again")
        self.taken[ours] = tensor if tensor.dtype is torch.float64 else tensor.float()

    def layer(self, theirs: str, ours: str, config: HeadConfig, read: int, norms: Sequence[str]) -> None:
        """A decoder layer whose q, k and v read `read` numbers."""
        hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        rows = {"q": config.num_attention_heads * dim, "k": config.num_key_value_heads * dim}
        rows["v"] = rows["k"]
        for name, count in rows.items():
            self.take(f"{theirs}self_attn.{name}_proj.weight", f"{ours}self_attn.{name}_proj.weight", (count, read))
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
        """The head's own table, with as many rows as the target's."""
        if config.own_embedding:
            self.pad("embed_tokens.weight", config.vocab_size)
            self.take("embed_tokens.weight", "embed_tokens.weight", (config.vocab_size, config.hidden_size))

    def pad(self, theirs: str, rows: int) -> None:
        """Give a tensor by the target's tokens as many rows as the target has."""
        self.left[theirs] = with_rows(self.files, theirs, self.left[theirs], rows)

    def finish(self) -> dict[str, Tensor]:
        """Haast's names and tensors. Raises HeadMismatchError where something was not used."""
        if self.left:
            more = f" and {len(self.left) - 6} more" if len(self.left) > 6 else ""
            raise self.files.wrong(
                f"the head as Haast reads it has no place for {', '.join(sorted(self.left)[:6])}{more}",
                "say which trainer wrote the head, or use another one",
            )
        return self.taken


def with_rows(files: HeadFiles, name: str, table: Tensor, rows: int) -> Tensor:
    """A table (n, ...) with so many rows: padding, which nobody reads, is cut or added.

    Raises HeadMismatchError where so much differs that it is another tokenizer's.
    """
    if table.dim() != 2 or abs(len(table) - rows) > rows // _PADDING:
        raise files.wrong(
            f"{name} is {tuple(table.shape)}, the target knows {rows} tokens", "use a head for this target's tokenizer"
        )
    if len(table) >= rows:
        return table[:rows]
    return torch.cat([table, table.new_zeros(rows - len(table), *table.shape[1:])])


def rope_of_document(document: dict[str, Any]) -> dict[str, Any] | None:
    """Rotary parameters as a head's config.json has them, in either of two forms; None where it is silent."""
    found = document.get("rope_parameters")
    if isinstance(found, dict) and ("rope_theta" in found or isinstance(found.get("full_attention"), dict)):
        return dict(found if "rope_theta" in found else found["full_attention"])
    theta, scaling = document.get("rope_theta"), document.get("rope_scaling")
    if theta is None and not scaling:
        return None
    more = dict(scaling) if isinstance(scaling, dict) else {}
    kind = more.pop("type", None)
    base = 10000.0 if theta is None else float(theta)
    return {"rope_type": more.pop("rope_type", kind or "default"), "rope_theta": base, **more}


def matrix(files: HeadFiles, tensors: dict[str, Tensor], name: str) -> Tensor:
    """One of some tensors, which sizes are read off. Raises HeadMismatchError where it is missing, or no matrix."""
    tensor = tensors.get(name)
    if tensor is None or tensor.dim() != 2:
        what = "is missing" if tensor is None else f"is {tuple(tensor.shape)}, no matrix"
        raise files.wrong(f"{name} {what}", "fetch the head again; Haast knows Llama and Qwen3 layers")
    return tensor


def sizes(files: HeadFiles, document: dict[str, Any], facts: TargetFacts) -> dict[str, Any]:
    """What `HeadConfig` wants, read off the tensors where they say it; the rest from config.json."""
    tensors = plain_names(files.tensors)
    output, gate, key = (
        matrix(files, tensors, f"layers.0.{name}.weight")
        for name in ("self_attn.o_proj", "mlp.gate_proj", "self_attn.k_proj")
    )
    heads: Any = document.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        raise files.wrong(f"num_attention_heads={heads!r} in config.json is no number", "correct it")
    hidden, width = output.shape
    norm = tensors.get("layers.0.self_attn.q_norm.weight")
    if norm is not None and norm.dim() != 1:
        raise files.wrong(f"layers.0.self_attn.q_norm.weight is {tuple(norm.shape)}", "fetch the head again")
    dim = len(norm) if norm is not None else int(document.get("head_dim") or 0) or int(width) // heads
    keys, eps = key.shape[0], document.get("rms_norm_eps")
    if dim < 1 or width % dim or keys % dim or width // dim != heads:
        raise files.wrong(
            f"layers.0.self_attn.q_proj.weight has {width} rows and k_proj {keys}, which is not {heads} heads "
            f"(num_attention_heads) of {dim} (head_dim)",
            "correct config.json",
        )
    shapes = {"hidden_size": hidden, "intermediate_size": gate.shape[0], "num_key_value_heads": keys // dim}
    for said, size in shapes.items():
        if document.get(said) not in (None, size):
            raise files.wrong(f"{said} in config.json is {document[said]}, the tensors make it {size}", "correct it")
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
        "num_hidden_layers": 1 + max(int(found[1]) for found in map(_LAYER.match, tensors) if found),
        "fc_bias": "fc.bias" in tensors,
        "qkv_bias": "layers.0.self_attn.q_proj.bias" in tensors,
        "o_bias": "layers.0.self_attn.o_proj.bias" in tensors,
        "qk_norm": norm is not None,
        "own_embedding": "embed_tokens.weight" in tensors,
    }


def eagle3_config(
    files: HeadFiles, document: dict[str, Any], facts: TargetFacts, layer_ids: Sequence[int] | None, **more: Any
) -> Eagle3Config:
    """An EAGLE-3 head's sizes; `layer_ids` are HF indices, None for those that everybody takes where none are named."""
    tensors = plain_names(files.tensors)
    head, mapping = tensors.get("lm_head.weight"), tensors.get("d2t")
    if "fc.weight" not in tensors:
        raise files.wrong(
            "fc.weight is missing: the head reads one state, without fusing (use_aux_hidden_state false)",
            "use a head that fuses several layers",
        )
    masks = [key for key in MASKS if isinstance(document.get(key), int)]
    if "mask_hidden" not in tensors and (masks or document.get("speculators_model_type") == "peagle"):
        raise files.wrong("it is a P-EAGLE head, and its tensor mask_hidden is missing", "fetch the head again")
    fc, output = (matrix(files, tensors, name) for name in ("fc.weight", "layers.0.self_attn.o_proj.weight"))
    for name, tensor, dims in (("lm_head.weight", head, 2), ("d2t", mapping, 1)):
        if tensor is not None and (tensor.dim() != dims or not len(tensor)):
            raise files.wrong(f"{name} is {tuple(tensor.shape)}", "fetch the head again")
    read = int(document.get("target_hidden_size") or output.shape[0])
    ids = tuple(facts.default_layers if layer_ids is None else sorted({int(each) for each in layer_ids}))
    if fc.shape[1] != read * len(ids):
        raise files.wrong(
            f"fc.weight reads {fc.shape[1]} numbers, {len(ids)} layers {list(ids)} of {read} are {read * len(ids)}",
            "correct the layer ids or target_hidden_size in config.json",
        )
    if ids and not (ids[0] >= 0 and ids[-1] <= facts.layers):
        raise files.wrong(
            f"the head reads layers {list(ids)}, the target has {facts.layers}",
            "use a head that was trained for this target",
        )
    vocab = int(facts.config.vocab_size)
    drafts = len(mapping) if mapping is not None else (len(head) if head is not None else vocab)
    config: Eagle3Config = made(
        files,
        Eagle3Config,
        **sizes(files, document, facts),
        layer_ids=ids,
        draft_vocab_size=0 if drafts >= vocab else drafts,
        fc_norm="fc_norm.0.weight" in Names.of(files).left,
        input_norm="input_norm.weight" in tensors,
        target_hidden_size=read,
        **more,
    )
    return config


def made(files: HeadFiles, kind: type[Any], **given: Any) -> Any:
    """A configuration; HeadMismatchError where its sizes make no head."""
    try:
        config = kind(**given)
        if isinstance(config, HeadConfig):
            LlamaRotaryEmbedding(config.layers())
    except NO_SIZES as error:
        why = f"{type(error).__name__}: {error}"
        rope = f" (its rotary parameters are {given['rope_parameters']})" if "rope_parameters" in given else ""
        raise files.wrong(f"sizes do not make a head: {why}{rope}", "correct config.json") from error
    return config


def eagle3_reading(
    files: HeadFiles, config: Eagle3Config, facts: TargetFacts, logit_scale: float = 1.0
) -> tuple[Reading, list[Question]]:
    """An EAGLE-3 head's tensors under Haast's names, and what every such head leaves open."""
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
    both = "layers.1.hidden_norm.weight" in names.left and not config.embedding_everywhere
    for number in range(1, config.num_hidden_layers):
        reads = 2 * hidden if config.embedding_everywhere else hidden
        later = norms if config.embedding_everywhere else norms[both ^ 1 :]
        names.layer(f"layers.{number}.", f"more.{number - 1}.", config, reads, later)
    if config.last_norm:
        names.take("norm.weight", "norm.weight", (hidden,))
    else:
        names.left.pop("norm.weight", None)
    shares = "lm_head.weight" not in names.left
    if not shares:
        if vocab is None:
            names.pad("lm_head.weight", config.drafts)
        names.take("lm_head.weight", "lm_head.weight", (config.drafts, hidden))
        head = names.taken["lm_head.weight"]
        names.taken["lm_head.weight"] = (head if logit_scale == 1.0 else head * logit_scale)[vocab_order(vocab)]
    names.embedding(config)
    if config.mask_token_id >= 0:
        names.take("mask_hidden", "mask_hidden", (1, 1, width))
    ids, asked = (None, None) if vocab is None else vocab
    reading = Reading(config, names.finish(), ids if ids is None else ids.sort().values, shares)
    if both:
        reading, question = later_norms(reading)
        questions.append(question)
    if asked is not None:
        questions.append(asked)
    return reading, questions


def vocab_order(vocab: tuple[Tensor, Question | None] | None) -> Any:
    """Rows of the LM head in the order of ascending ids."""
    return slice(None) if vocab is None else vocab[0].argsort()


def draft_ids(names: Names, config: Eagle3Config) -> tuple[Tensor, Question | None] | None:
    """The target ids that the head drafts, in the order of its LM head's rows, and the question where two are possible.

    `d2t` is an offset in every safetensors format and absolute in GGUF files; `t2d`, where it is there, decides.
    """
    d2t, t2d = names.left.pop("d2t", None), names.left.pop("t2d", None)
    if d2t is None:
        if t2d is not None and config.draft_vocab_size:
            raise names.files.wrong("it has t2d alone of d2t and t2d", "fetch the head again")
        if config.draft_vocab_size and config.vocab_size - config.drafts > config.vocab_size // _PADDING:
            raise names.files.wrong(
                f"lm_head.weight has {config.drafts} rows for the target's {config.vocab_size} tokens, and d2t, which "
                f"says whose they are, is missing",
                "fetch the head again, or use one for this target's tokenizer",
            )
        return (torch.arange(config.draft_vocab_size), None) if config.draft_vocab_size else None
    if d2t.dim() != 1 or d2t.is_floating_point() or d2t.is_complex():
        raise names.files.wrong(f"d2t is {tuple(d2t.shape)} of {d2t.dtype}", "d2t has one whole number a draft token")
    offset, absolute = d2t.long() + torch.arange(len(d2t)), d2t.long()
    named = None if t2d is None else t2d.bool().nonzero().flatten()
    fits = {}
    for label, ids in (("an offset", offset), ("absolute ids", absolute)):
        inside = int(ids.min()) >= 0 and int(ids.max()) < config.vocab_size and len(set(ids.tolist())) == len(ids)
        if inside and (named is None or torch.equal(ids.sort().values, named)):
            fits[label] = ids
    if not fits:
        beside = "" if named is None else f" and t2d ({len(named)} tokens)"
        raise names.files.wrong(
            f"d2t{beside} makes no draft vocabulary of {len(d2t)} different tokens below {config.vocab_size}, neither "
            f"as an offset nor as ids",
            "use a head for this target's tokenizer, or fetch it again",
        )
    (_, first), *others = fits.items()
    if not config.draft_vocab_size:  # it names all tokens
        return None if torch.equal(first, torch.arange(len(first))) else (first, None)
    asked = None
    if others and not torch.equal(first, absolute):
        asked = Question(
            "d2t",
            (Option("an offset", lambda reading: reading), Option("absolute ids", as_absolute(first, absolute))),
        )
    return first, asked


def eagle1_reading(
    files: HeadFiles, config: FeatExtrapolatorConfig, facts: TargetFacts, names: Names | None = None
) -> tuple[Reading, list[Question]]:
    """An EAGLE-1 or EAGLE-2 head's tensors under Haast's names."""
    names, hidden = names or Names.of(files), config.hidden_size
    names.left.pop("lm_head.weight", None)  # the target's own, whose copy some files have
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
        words = {False: "the state", True: "the normed state"}
        questions.append(Question.of("fed back", "norm_output", [(words[each], each) for each in (False, True)]))
    return Reading(config, names.finish()), questions
