"""`haast import`, `haast export` and `haast check`: heads in, heads out, and whether one drafts for its target."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from haast.cli.boundary import human_output
from haast.cli.settings import JsonOption, Loading, text_config
from haast.files import check_new_folder, check_writable, write_json

if TYPE_CHECKING:
    from haast.formats.probe import Settled

HeadArgument = Annotated[
    str, typer.Argument(help="A folder, a .gguf file, or a hub id (owner/name, owner/name@revision).")
]


def import_(
    head: HeadArgument,
    loading: Loading,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to keep it; ./NAME if absent.")] = None,
    json_out: JsonOption = None,
) -> None:
    """Read a head of another trainer, measure what its files leave open, and keep it as one of Haast's.

    Every command and call takes such heads as they are too, and measures anew each time.

    \b
    haast import yuhuili/EAGLE3-LLaMA3.1-Instruct-8B --model meta-llama/Llama-3.1-8B-Instruct
    haast import ./their-head --model ./my-model --out my-head
    """
    loading.check()
    check_writable(json_out)
    from haast.formats.export import import_head
    from haast.formats.opened import OpenedHead, check_head, open_head
    from haast.progress import Progress
    from haast.target.load import hub_name

    if head == "default":
        raise ValueError("default is Haast's own head: use it as it is (haast export writes it for others)")
    found = open_head(head)
    if not isinstance(found, OpenedHead):
        raise ValueError(f"{head} is a head of Haast's already: use it as it is (haast export writes it for others)")
    place = Path(Path(head).name.split("@")[0].removesuffix(".gguf")) if out is None else out
    check_new_folder(place)
    print(found.summary, file=human_output(json_out))
    check_head(found, text_config(loading.model), loading.model)  # before the target loads
    target = loading.load()
    with Progress("measuring") as progress:
        fitted, settled = found.fitted(target, say=progress.say)
    dtype = import_head(found, fitted, settled, hub_name(loading.model), place)
    if settled is not None:
        _show(settled, json_out)
    kept = f"kept in {place} ({str(dtype).removeprefix('torch.')})"
    model, folder = shlex.quote(loading.model), shlex.quote(str(place))
    print(f"{kept}; haast generate --model {model} --head {folder} ...", file=human_output(json_out))
    write_json({"head": head, "summary": found.summary, "out": str(place), "about": fitted.about}, json_out)


def export(
    head: HeadArgument,
    loading: Loading,
    to: Annotated[str, typer.Option(metavar="ENGINE", help="official, vllm, sglang, speculators, llama.cpp or gguf.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to write it; ./NAME-ENGINE if absent.")] = None,
    json_out: JsonOption = None,
) -> None:
    """Write a head in the layout of another engine, read it again and compare its drafts bit for bit.

    HEAD is one of Haast's ("default" is the shipped one) or of another trainer, which is then measured first.

    \b
    haast export my-head --to vllm --model my-model --out for-vllm
    haast export default --to sglang
    """
    loading.check()
    check_writable(json_out)
    from haast.drafters.factory import find_head
    from haast.formats.export import ENGINES, export_head, wants_embedding
    from haast.formats.opened import OpenedHead, check_head, embedding_of, open_head
    from haast.target.load import hub_name, read_config

    if to not in ENGINES:
        raise ValueError(f"--to {to} is no engine that Haast writes for: choose one of {', '.join(ENGINES)}")
    folder = find_head(head, loading.model)
    assert folder is not None, "a head was named"
    found = open_head(folder)
    place = Path(f"{Path(head).name}-{to}") if out is None else out
    check_new_folder(place)
    config = read_config(loading.model)
    check_head(found, config.get_text_config(), loading.model)
    target = loading.load() if isinstance(found, OpenedHead) or wants_embedding(to) else None
    if isinstance(found, OpenedHead):
        assert target is not None, "it is loaded for heads that are not Haast's"
        found, _ = found.fitted(target)
    table = embedding_of(target) if target is not None and wants_embedding(to) else None
    written = export_head(found, to, hub_name(loading.model), config, place, table)
    say = human_output(json_out)
    for note in written.notes:
        print(note, file=say)
    form = str(written.dtype).removeprefix("torch.")
    print(f"written to {written.place} ({form}), read again: its drafts are the same\n{written.serve}", file=say)
    document = {"out": str(written.place), "engine": to, "dtype": form, "notes": list(written.notes)}
    write_json({**document, "serve": written.serve}, json_out)


def check(head: HeadArgument, loading: Loading, json_out: JsonOption = None) -> None:
    """Tell how well a head drafts for a target, and what may be wrong where it drafts badly.

    Measured on about 200 tokens of the target's own greedy text: each convention that heads differ in is tried the
    other way too, and what the head's files say of its making is compared with the target. Ends with 1 where the head
    drafts far below what its files say, or hardly at all.

    \b
    haast check my-head --model my-model
    haast check default
    """
    loading.check()
    check_writable(json_out)
    from haast.drafters.factory import find_head
    from haast.drafters.head_check import diagnose
    from haast.formats.opened import check_head, open_head
    from haast.progress import Progress

    folder = find_head(head, loading.model)
    assert folder is not None, "a head was named"
    found = open_head(folder)
    check_head(found, text_config(loading.model), loading.model)
    target = loading.load()
    with Progress("measuring") as progress:
        diagnosis = diagnose(target, found, loading.model, progress.say)
    _show(diagnosis.settled, json_out)
    say = human_output(json_out)
    for line in () if diagnosis.fine else diagnosis.findings:
        print(line, file=say)
    print(diagnosis.verdict, file=say)
    write_json(diagnosis.document(), json_out)
    if not diagnosis.fine:
        raise typer.Exit(1)


def _show(settled: Settled, json_out: str | None) -> None:
    """The table of what was tried."""
    from rich.console import Console
    from rich.table import Table

    table = Table("question", "answer", "next token", "tau of a chain", "", box=None, pad_edge=False)
    before = ""
    for each in settled.tried:
        numbers = (f"{each.agreement.first:.3f}", f"{each.agreement.tau:.3f}", "kept" if each.kept else "")
        table.add_row("" if each.question == before else each.question, each.answer, *numbers)
        before = each.question
    say, found = human_output(json_out), settled.agreement
    if settled.tried:
        Console(file=say, highlight=False, width=120).print(table)
    print(
        f"next token {found.first:.3f}, tau of a chain of three {found.tau:.3f}, on {len(found.accepted)} positions of "
        f"the target's own text",
        file=say,
    )
    for each in settled.changed:
        print(f"otherwise than the files say: {each.question} is {each.answer}", file=say)
    for line in settled.unsure:
        print(f"within noise: {line}", file=say)
