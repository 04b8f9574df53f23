"""`haast import`, `haast export` and `haast check`: convert heads, and measure how well one drafts for its target."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from haast.cli.boundary import human_output
from haast.cli.settings import JsonOption, Loading, text_config
from haast.files import check_new_folder, check_writable, write_json
from haast.formats import ENGINES

if TYPE_CHECKING:
    from haast.formats.probe import ProbeResult

HeadArgument = Annotated[
    str,
    typer.Argument(
        help="A folder, a .gguf file, a hub id (owner/name, owner/name@revision), or 'mtp' for the one in the target's "
        "checkpoint."
    ),
]


def import_(
    head: HeadArgument,
    loading: Loading,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to save it; ./NAME if absent.")] = None,
    json_out: JsonOption = None,
) -> None:
    """Convert a head of another trainer to Haast's format, measuring the conventions that its files leave open.

    All commands accept such heads without an import too, but then measure again each time.

    \b
    haast import yuhuili/EAGLE3-LLaMA3.1-Instruct-8B --model meta-llama/Llama-3.1-8B-Instruct
    haast import ./their-head --model ./my-model --out my-head
    """
    loading.check()
    check_writable(json_out)
    from haast.drafters.factory import find_head
    from haast.formats.export import import_head
    from haast.formats.opened import OpenedHead, check_head, open_head
    from haast.progress import Progress
    from haast.target.load import hub_name

    if head == "default":
        raise ValueError(
            "'default' is Haast's own head: use it directly (`haast export` converts it for other engines)"
        )
    path = find_head(head, loading.model)
    assert path is not None, "HEAD is required"
    opened = open_head(path)
    if not isinstance(opened, OpenedHead):
        raise ValueError(f"{head} is a Haast head already: use it directly (`haast export` converts it)")
    folder = Path(Path(head).name.split("@")[0].removesuffix(".gguf")) if out is None else out
    check_new_folder(folder)
    print(opened.summary, file=human_output(json_out))
    check_head(opened, text_config(loading.model), loading.model)  # before the target loads
    target = loading.load()
    with Progress("measuring") as progress:
        fitted, result = opened.fitted(target, report=progress.set_status)
    dtype = import_head(opened, fitted, result, hub_name(loading.model), folder)
    if result is not None:
        _show(result, json_out)
    saved = f"saved in {folder} ({str(dtype).removeprefix('torch.')})"
    options = f"--model {shlex.quote(loading.model)} --head {shlex.quote(str(folder))}"
    print(f"{saved}; haast generate {options} ...", file=human_output(json_out))
    write_json({"head": head, "summary": opened.summary, "out": str(folder), "about": fitted.about}, json_out)


def export(
    head: HeadArgument,
    loading: Loading,
    to: Annotated[str, typer.Option(metavar="ENGINE", help="official, vllm, sglang, speculators, llama.cpp or gguf.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to write it; ./NAME-ENGINE if absent.")] = None,
    json_out: JsonOption = None,
) -> None:
    """Write a head in the layout of another engine, then read it again and check that its drafts are equal.

    HEAD is a Haast head ("default" is the shipped one) or one of another trainer, whose open conventions are measured
    first.

    \b
    haast export my-head --to vllm --model my-model --out for-vllm
    haast export default --to sglang
    """
    if to not in ENGINES:  # before anything that takes seconds
        raise ValueError(f"Haast can't export to --to {to}: choose one of {', '.join(ENGINES)}")
    loading.check()
    check_writable(json_out)
    from haast.drafters.factory import find_head
    from haast.formats.export import export_head, wants_embedding
    from haast.formats.opened import OpenedHead, check_head, embedding_of, open_head
    from haast.target.load import hub_name, read_config

    folder = find_head(head, loading.model)
    assert folder is not None, "HEAD is required"
    source = open_head(folder)
    destination = Path(f"{Path(head).name}-{to}") if out is None else out
    check_new_folder(destination)
    config = read_config(loading.model)
    check_head(source, config.get_text_config(), loading.model)
    target = loading.load() if isinstance(source, OpenedHead) or wants_embedding(to) else None
    if isinstance(source, OpenedHead):
        assert target is not None, "loaded above for foreign heads"
        source, _ = source.fitted(target)
    table = embedding_of(target) if target is not None and wants_embedding(to) else None
    exported = export_head(source, to, hub_name(loading.model), config, destination, table)
    stream = human_output(json_out)
    for note in exported.notes:
        print(note, file=stream)
    dtype = str(exported.dtype).removeprefix("torch.")
    print(f"written to {exported.path} ({dtype}), read again: its drafts are the same\n{exported.serve}", file=stream)
    document = {"out": str(exported.path), "engine": to, "dtype": dtype, "notes": list(exported.notes)}
    write_json({**document, "serve": exported.serve}, json_out)


def check(head: HeadArgument, loading: Loading, json_out: JsonOption = None) -> None:
    """Measure how well a head drafts for a target, and list likely causes if it drafts badly.

    Measures on about 200 tokens of the target's own greedy text, and tries the alternatives of each convention that
    heads differ in. Compares the training data that the head's files state with the target. Ends with exit code 1 if
    the head drafts far worse than its files state, or hardly at all.

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
    assert folder is not None, "HEAD is required"
    opened = open_head(folder)
    check_head(opened, text_config(loading.model), loading.model)
    target = loading.load()
    with Progress("measuring") as progress:
        diagnosis = diagnose(target, opened, loading.model, progress.set_status)
    _show(diagnosis.settled, json_out)
    stream = human_output(json_out)
    for line in () if diagnosis.fine else diagnosis.findings:
        print(line, file=stream)
    print(diagnosis.verdict, file=stream)
    write_json(diagnosis.document(), json_out)
    if not diagnosis.fine:
        raise typer.Exit(1)


def _show(result: ProbeResult, json_out: str | None) -> None:
    """Print the measurements as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("question", "answer", "next token", "tau of a chain", "", box=None, pad_edge=False)
    previous = ""
    for trial in result.tried:
        numbers = (f"{trial.agreement.first:.3f}", f"{trial.agreement.tau:.3f}", "kept" if trial.kept else "")
        table.add_row("" if trial.question == previous else trial.question, trial.answer, *numbers)
        previous = trial.question
    stream, best = human_output(json_out), result.agreement
    if result.tried:
        Console(file=stream, highlight=False, width=120).print(table)
    print(
        f"next token {best.first:.3f}, tau of a chain of three {best.tau:.3f}, on {len(best.accepted)} positions of "
        f"the target's own text",
        file=stream,
    )
    for trial in result.changed:
        print(f"unlike the default reading of the files: {trial.question} is {trial.answer}", file=stream)
    for line in result.unsure:
        print(f"within noise: {line}", file=stream)
