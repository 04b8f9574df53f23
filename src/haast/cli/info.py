"""`haast info`: lists versions, paths, and properties of the model and head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from haast.cli.settings import Drafting, JsonOption, Loading
from haast.files import check_writable, write_json

if TYPE_CHECKING:
    from haast.target.target import Target


def info(loading: Loading, drafting: Drafting, json_out: JsonOption = None) -> None:
    """Show versions, device, native kernels, and properties of the model and head.

    \b
    haast info
    haast info --model ./my-model --head ./my-head --json -
    """
    loading.check()
    check_writable(json_out)
    head = _head(drafting, loading.model)
    target = loading.load()
    document = {"haast": _installation(), "model": _model(target, loading), "head": head}
    if "location" in head:
        document["drafting"] = _drafting(target, loading, drafting)
    for name, facts in document.items() if json_out != "-" else ():
        print(name)
        for key, value in _flat(facts):
            print(f"  {key:22} {value}")
    write_json(document, json_out)
    if "problem" in head:
        raise typer.Exit(1)


def _flat(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Flatten nested entries for printing; omit empty values, and show only the length of lists."""
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", inner) for name, inner in _flat(value))
        elif isinstance(value, list):
            yield key, f"{len(value)} entries (all with --json)"
        elif value not in ("", None):
            yield key, value


def _installation() -> dict[str, Any]:
    import torch

    import haast
    from haast import native
    from haast.bench.report import git_commit, versions
    from haast.device import cpu_name

    return {
        **versions(),
        "folder": str(Path(haast.__file__).parent),
        "commit": git_commit(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "native_kernels": native.available(),
        "native_accelerated": native.accelerated(),
        "native_why_not": native.why_not(),
    }


def _model(target: Target, loading: Loading) -> dict[str, Any]:
    from haast.formats.mtp import described
    from haast.target.load import resolve
    from haast.target.packing import is_packed, linear_sizes

    source = resolve(loading.model)
    file = source.open_gguf()
    packed = [module for module in target.model.modules() if is_packed(module)]
    tied = bool(getattr(target.config, "tie_word_embeddings", False))
    # Packed weights are buffers, not parameters. Those of a tied LM head would count the embedding twice.
    counted = [module for module in packed if not (tied and module is target.lm_head)]
    parameters = sum(p.numel() for p in target.model.parameters()) + linear_sizes(counted)[1]
    return {
        "name": loading.model,
        "class": type(target.model).__name__,
        "location": source.location if file is None else str(file.path),
        "quantised": None if file is None else file.quantisation(),
        "parameters": parameters,
        "layers": target.layers,
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "context": target.context_length,
        "mtp_head": described(loading.model),
        "dtype": loading.dtype,
        "precision": target.precision,
        "packed_linears": len(packed),
        "device": str(target.device),
        "compile": target.compiling,
    }


def _drafting(target: Target, loading: Loading, drafting: Drafting) -> dict[str, Any]:
    """The draft configuration in use: from a calibration, or from the options."""
    from haast.drafters.calibrated import default_path, identity
    from haast.drafters.eagle import EagleDrafter

    drafter = drafting.load(target, loading.model, drafting.check(loading.model, loading.device))
    assert drafter is not None, "the head exists"
    if not isinstance(drafter, EagleDrafter):
        return {"shape": asdict(drafter.shape), "pace": "fixed size"}
    calibration = drafting.calibrated(target, drafter)
    path = drafting.calibration if drafting.calibration != "auto" else str(default_path(identity(target, drafter)))
    return {
        "calibration": "none (`haast calibrate` creates one)" if calibration is None else path,
        "expected_speedup": None if calibration is None else round(calibration.expected["speedup"], 2),
        "shape": asdict(drafter.shape),
        "pace": "levels and nodes chosen at each step by cost" if drafter.pace is not None else "fixed size",
    }


def _head(drafting: Drafting, model: str) -> dict[str, Any]:
    """Properties of the head; a missing or broken one gives a "problem" entry instead of an error."""
    from haast.drafters.factory import open_head
    from haast.formats.opened import OpenedHead

    try:
        folder = drafting.folder(model)
        head = open_head(folder, model)
    except ValueError as error:
        return {"name": drafting.head, "problem": str(error)}
    if head is None:
        return {"name": "none"}
    if isinstance(head, OpenedHead):
        return {"name": drafting.head, "location": str(folder), "found": head.summary}
    return {
        "name": drafting.head,
        "location": str(folder),
        "parameters": sum(p.numel() for p in head.module.parameters()),
        "draft_vocab": None if head.draft_vocab is None else len(head.draft_vocab),
        "sizes": asdict(head.module.config),
        "about": head.about,
    }
