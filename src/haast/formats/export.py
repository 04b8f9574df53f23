"""Writes a head for another engine, reads the files again and checks that the drafts are equal bit for bit.

Owns the files on disk and the model card. The format modules (`formats.official`, ...) own the layouts.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from haast.files import new_folder, replacing, write_json, write_text
from haast.formats import ENGINES
from haast.formats.base import Format, Reading, ServingEngine, TargetFacts
from haast.formats.files import CONFIG
from haast.formats.gguf import GGUF_FILE, Gguf
from haast.formats.medusa import Medusa
from haast.formats.mtp import Mtp
from haast.formats.official import Official
from haast.formats.opened import OpenedHead, open_foreign, reading_of, registered
from haast.formats.probe import ProbeResult
from haast.formats.speculators import Speculators
from haast.heads.block import BlockConfig
from haast.heads.checkpoint import Head, build_module, save_head
from haast.heads.eagle3 import Eagle3Config
from haast.heads.medusa import MedusaConfig
from haast.heads.module import DraftModule
from haast.heads.mtp import MtpConfig

_TITLES = {
    "eagle": "EAGLE head", "eagle3": "EAGLE-3 head", "p-eagle": "P-EAGLE head", "medusa": "Medusa heads",
    "mtp": "MTP head", "dflash": "DFlash head", "dspark": "DSpark head",
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        path: the folder, or the .gguf file in it.
        serve: the command that serves the target with the head.
        notes: for the user, what the layout loses, say.
        dtype: of the written tensors.
    """

    path: Path
    serve: str
    notes: tuple[str, ...]
    dtype: torch.dtype


def export_head(
    head: Head, engine: str, target: str, config: PretrainedConfig, out: Path, embedding: Tensor | None = None
) -> Exported:
    """Write a head for an engine, and check that the written head drafts the same, bit for bit.

    Args:
        head: Haast's own, or an imported one.
        engine: one of `formats.ENGINES`, or the name of a registered format.
        target: the target's name or hub id, for the card and the command.
        config: the target's configuration.
        out: the folder to write; it must be empty or absent.
        embedding: the target's token embeddings, (vocabulary, H), for engines of `wants_embedding`.

    Raises:
        ValueError: the engine is unknown or can't draft with this head, or the written head drafts differently.
    """
    if engine not in ENGINES and registered(engine) is None:
        raise ValueError(f"Haast can't export to --to {engine}: choose one of {', '.join(ENGINES)}")
    text = config.get_text_config()
    reading, facts = reading_of(head), TargetFacts(text)
    if isinstance(reading.config, BlockConfig) and registered(engine) is None:
        raise ValueError(f"Haast can't export block heads to --to {engine}: they draft in Haast only")
    serving = ServingEngine(engine, target, {**text.to_dict(), "architectures": config.architectures})
    dtype = exact_dtype(reading.weights)
    layout = _format_for(reading, engine)
    written = layout.write(reading, serving)
    layout.check(written, reading, facts)
    if embedding is not None and wants_embedding(engine):
        written = replace(written, tensors={"embed_tokens.weight": embedding, **written.tensors})
        dtype = exact_dtype(written.tensors)
    path, notes = out / GGUF_FILE if engine == "gguf" else out, list(written.notes)
    serve = serving_command(engine, reading, target, path)
    stored = replace(written, tensors={name: _in_dtype(tensor, dtype) for name, tensor in written.tensors.items()})
    with new_folder(out) as folder:
        if not layout.write_files(folder, stored, dtype):
            document = {**stored.document, "torch_dtype": str(dtype).removeprefix("torch.")}
            _write_folder(folder, document, stored.tensors)
        _compare_drafts(reading, open_foreign(folder, str(path)), facts)
        write_text(folder / "README.md", _card(head, reading, engine, target, serve, notes))
    return Exported(path, serve, tuple(notes), dtype)


def wants_embedding(engine: str) -> bool:
    """Whether folders for this engine must hold the target's embedding if the head has none of its own.

    speculators 0.9 should take a missing embedding from the target, but leaves it uninitialised.
    """
    return engine == "speculators"


def import_head(head: OpenedHead, fitted: Head, result: ProbeResult | None, target: str, out: Path) -> torch.dtype:
    """Save a foreign head in Haast's own layout, with a model card that names its source and the measurements."""
    weights = dict(fitted.module.state_dict())
    dtype = exact_dtype(weights)
    about = {**fitted.about, "target": target}
    facts = [f"from {head.files.source}", f"converted by Haast from the {head.format.name} layout"]
    facts += [f"licence: {about['licence']}"] if "licence" in about else []
    facts += [f"about its files: {note}" for note in head.files.notes]
    facts += [f"not distinguishable by measuring: {pair}" for pair in about.get("unsure", ())]
    expected = about.get("expected", {})
    card = _templates().get_template("card.md")
    text = card.render(
        library="haast",
        target=target,
        licence=about.get("licence"),
        kind=head.kind,
        title=f"{_TITLES[head.kind]} for {target}",
        facts=facts,
        serve=None,
        probed=() if result is None else result.tried,
        positions=expected.get("positions"),
        first=expected.get("first"),
        tau=expected.get("chain_tau"),
    )
    with new_folder(out) as folder:
        save_head(folder, fitted.module.config, weights, fitted.draft_vocab, about, dtype)
        write_text(folder / "README.md", text)
    return dtype


def exact_dtype(weights: dict[str, Tensor]) -> torch.dtype:
    """The first of float16, bfloat16 and float32 that holds every value exactly."""
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(t.to(dtype).to(t.dtype), t) for t in weights.values() if t.is_floating_point()):
            return dtype
    return torch.float32


def serving_command(engine: str, reading: Reading, target: str, path: Path) -> str:
    """The command that serves the target with the head; for a registered format, the Python expression."""
    if registered(engine) is not None:  # the command line does not have it
        return f"Haast.from_pretrained({target!r}, head={str(path)!r})"
    where, kind = shlex.quote(str(path)), kind_of_reading(reading)
    target = shlex.quote(target)
    method = "eagle" if kind == "eagle" else "eagle3"
    if engine == "vllm":
        spec = {"method": method, "model": str(path), "num_speculative_tokens": 3}
        return f"vllm serve {target} --speculative-config {shlex.quote(json.dumps(spec))}"
    if engine == "speculators":
        return f"vllm serve {where}"
    if engine == "sglang":
        trees = "--speculative-num-steps 3 --speculative-eagle-topk 4 --speculative-num-draft-tokens 16"
        return (
            f"python -m sglang.launch_server --model {target} --speculative-algorithm {method.upper()} "
            f"--speculative-draft-model-path {where} {trees}"
        )
    if engine == "gguf":
        return f"llama-server -m TARGET.gguf -md {where} --spec-type draft-eagle3 --spec-draft-n-max 3"
    if engine == "llama.cpp":
        return (
            f"python convert_hf_to_gguf.py {where} --target-model-dir {target} --outfile head.gguf && llama-server "
            f"-m TARGET.gguf -md head.gguf --spec-type draft-eagle3 --spec-draft-n-max 3"
        )
    return f"haast generate --model {target} --head {where} PROMPT"


def kind_of_reading(reading: Reading) -> str:
    """One of `formats.detect.KINDS`."""
    config = reading.config
    if isinstance(config, MedusaConfig):
        return "medusa"
    if isinstance(config, MtpConfig):
        return "mtp"
    if isinstance(config, BlockConfig):
        return "dspark" if config.markov_rank else "dflash"
    if isinstance(config, Eagle3Config):
        return "p-eagle" if config.mask_token_id >= 0 else "eagle3"
    return "eagle"


def _format_for(reading: Reading, engine: str) -> Format:
    own = registered(engine)
    if own is not None:
        return own
    if isinstance(reading.config, MtpConfig):
        return Mtp()
    if engine == "gguf":
        return Gguf()
    if engine == "speculators":
        return Speculators()
    return Medusa() if isinstance(reading.config, MedusaConfig) else Official()


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def _write_folder(out: Path, document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    name = "medusa_lm_head.safetensors" if "medusa_num_heads" in document else "model.safetensors"
    with replacing(out / name) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(document, out / CONFIG)


def _compare_drafts(reading: Reading, reread: OpenedHead, facts: TargetFacts) -> None:
    """Raise ValueError unless the head drafts the same after it was written and read again."""
    written, _ = reread.read(facts)
    before, after = _draft_outputs(reading), _draft_outputs(written)
    # EAGLE-1 and Medusa layouts have no draft vocabulary, which the export notes mention.
    maps = isinstance(reading.config, Eagle3Config) and reading.draft_vocab is not None
    lost = maps and (written.draft_vocab is None or not torch.equal(written.draft_vocab, reading.draft_vocab))  # type: ignore[arg-type]
    if lost or not torch.equal(before, after):
        raise ValueError(
            f"{reread.files.source}, read again, gives other {'tokens' if lost else 'states'} than the head: an engine "
            f"that loads it would draft differently; please report it"
        )


def _draft_outputs(reading: Reading) -> Tensor:
    """The head's output for fixed random features; equal heads give bit-identical tensors."""
    vocab = None if reading.draft_vocab is None else len(reading.draft_vocab)
    if isinstance(reading.config, MedusaConfig) and vocab is None:
        vocab = reading.weights[f"0.{reading.config.blocks}.weight"].shape[0]
    module = build_module(reading.config, vocab).float().eval()
    module.load_state_dict({name: tensor.float() for name, tensor in reading.weights.items()})
    generator, config = torch.Generator().manual_seed(0), reading.config
    with torch.no_grad():
        if not isinstance(module, DraftModule):
            states = torch.randn(1, 16, config.hidden_size, generator=generator)
            first: Any = module[0]
            for block in first[:-1]:
                states = block(states)
            return states
        assert not isinstance(config, MedusaConfig), "a DraftModule"
        width = len(module.target_layers) * config.read_size if isinstance(config, Eagle3Config) else config.hidden_size
        features = torch.randn(1, 16, width, generator=generator)
        embeddings = torch.randn(1, 16, config.hidden_size, generator=generator)
        states = module(embeddings, module.fuse(features), torch.arange(16)[None])
        if isinstance(config, Eagle3Config) and "lm_head.weight" in reading.weights:
            states = module.normed(states) @ reading.weights["lm_head.weight"].float().T
        return states


def _card(head: Head, reading: Reading, engine: str, target: str, serve: str, notes: Sequence[str]) -> str:
    about, kind = head.about, kind_of_reading(reading)
    facts = [f"trained by Haast: {about['command']}"] if "command" in about else []
    facts += [f"from {about['source']}"] if "source" in about else []
    if about.get("tau") is not None:  # None without validation prompts
        facts.append(f"tau {about['tau']:.2f} on validation prompts ({about.get('tau_measured_on', '')})")
    facts += [f"exported for {engine}", *notes]
    library = "gguf" if engine == "gguf" else "transformers"
    return (
        _templates()
        .get_template("card.md")
        .render(
            library=library,
            target=target,
            licence=about.get("licence"),
            kind=kind,
            title=f"{_TITLES[kind]} for {target}",
            facts=facts,
            serve=serve,
            probed=(),
        )
    )


def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("haast", "formats/templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
