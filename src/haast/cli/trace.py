"""`haast trace`: one prompt, and for every step what was drafted, what was accepted, and why the rest was not.

Owns the terminal's view. The recording is `bench.trace`'s, the page `bench.page`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haast.cli.boundary import human_output
from haast.cli.loading import load_chosen
from haast.cli.settings import Choice, Drafting, JsonOption, Loading, Sampling, check_at_least
from haast.errors import expanded
from haast.files import check_writable, write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    from haast.bench.trace_view import StepView

_STYLES = {
    "root": "bold", "accepted": "green", "cut": "green", "rejected": "dim", "unreached": "dim", "probe": "dim italic",
}  # fmt: skip
_SIGNS = {"root": "", "accepted": "\u2713 ", "cut": "\u2713 ", "rejected": "\u2717 ", "unreached": "  ", "probe": "? "}


def trace(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from stdin.")],
    loading: Loading,
    drafting: Drafting,
    sampling: Sampling,
    drafter: Annotated[
        str,
        typer.Option(
            "--drafter",
            "--decoder",
            help="auto, eagle, eagle+suffix, medusa, small-model, lookahead, lookup, suffix or none.",
        ),
    ] = "auto",
    small_model: Annotated[str | None, typer.Option(metavar="NAME", help="The smaller model that drafts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Exact upper bound of new tokens.")] = 32,
    raw: Annotated[bool, typer.Option("--raw", help="Don't put the prompt through the chat template.")] = False,
    html_out: Annotated[
        str | None, typer.Option("--html", metavar="OUT", help="Write the same view as one self-contained page.")
    ] = None,
    json_out: JsonOption = None,
) -> None:
    """Show each step's tree: what was drafted, what was accepted, and what the target said instead.

    \b
    haast trace "Why is the sky blue?"
    haast trace "Why is the sky blue?" --drafter lookahead --html trace.html --json trace.json
    """
    check_at_least("max_new_tokens", max_new_tokens)
    prompt = sys.stdin.read() if prompt == "-" else prompt
    if not prompt:
        raise ValueError("the prompt is empty: give some text")
    check_writable(json_out)
    check_writable(html_out)
    if html_out == "-" == json_out:
        raise ValueError("--html - and --json - both ask for stdout: write one of them to a file")
    choice = Choice(drafter, small_model)
    document = _record(prompt, loading, drafting, sampling, choice, max_new_tokens, raw)

    from rich.console import Console

    out = human_output("-" if html_out == "-" else json_out)
    show_trace(document, Console(file=out, highlight=False, width=None if out.isatty() else 120))
    write_json(document, json_out)
    if html_out is not None:
        from haast.bench.page import trace_html

        page = trace_html(document)
        sys.stdout.write(page) if html_out == "-" else write_text(expanded(html_out, "cannot write"), page)


def _record(
    prompt: str,
    loading: Loading,
    drafting: Drafting,
    sampling: Sampling,
    choice: Choice,
    max_new_tokens: int,
    raw: bool,
) -> dict[str, Any]:
    """Check everything, load, and record."""
    from haast.api import Haast
    from haast.bench.decoders import KNOWN
    from haast.bench.report import machine
    from haast.bench.trace import record_trace
    from haast.drafters.factory import NAMES
    from haast.drafters.vanilla import VanillaDrafter
    from haast.engine.engine import StopParams

    params = sampling.check()
    if choice.drafter not in (*NAMES, "vanilla") and (choice.drafter in KNOWN or "," in choice.drafter):
        raise ValueError(
            f"drafter={choice.drafter!r} can't be traced: give one that runs in Haast's engine, by sample-and-match"
        )
    loading.check()
    target, drafter = load_chosen(choice, loading, drafting)
    model = Haast(target, VanillaDrafter())
    where = machine() | {
        "model": loading.model,
        "dtype": str(target.dtype).removeprefix("torch."),
        "packing": target.packing,
    }
    rules = StopParams(max_new_tokens, model.eos_ids())
    return record_trace(target, drafter, model.encode(prompt, chat=not raw), params, rules, prompt, where)


def show_trace(document: Mapping[str, Any], console: Console) -> None:
    """The text with its drafted tokens in colour, then every step's tree."""
    from rich.text import Text

    from haast.bench.trace_view import StepView

    console.print(_answer(document))
    tau = f"tau {document['tau']:.2f}" if document["target_forwards"] else "no step was taken"
    counts = f"{document['tokens']} tokens, {document['target_forwards']} target forwards"
    console.print(
        Text(f"\n{document['decoder']}: {counts}, {tau}; probabilities are the target's, {document['probabilities']}")
    )
    for number, step in enumerate(document["steps"], start=1):
        view = StepView(step)
        console.print(Text(f"\nstep {number}: {view.summary()}", style="bold"))
        console.print(_tree(view))


def _answer(document: Mapping[str, Any]) -> Text:
    """The emitted text: accepted drafts green, the target's own tokens bold."""
    from rich.text import Text

    text = Text(document["prefill"]["text"], style="bold")
    for step in document["steps"]:
        for token in step["emitted"]:
            text.append(token["text"], style="not bold green" if token["drafted"] else "bold")
    return text


def _tree(view: StepView) -> Tree:
    from rich.tree import Tree

    root = Tree(_label(view, 0), guide_style="dim")
    bonus = view.bonus()

    def grow(branch: Tree, number: int) -> None:
        for child in view.children[number]:
            grow(branch.add(_label(view, child)), child)
        if bonus is not None and bonus[0] == number:
            branch.add(_bonus(bonus[1]))

    grow(root, 0)
    return root


def _label(view: StepView, number: int) -> Text:
    from rich.text import Text

    from haast.bench.trace_view import percent, visible

    node, fate = view.nodes[number], view.fate(number)
    label = Text(f"{_SIGNS[fate]}{visible(node['text'])}", style=_STYLES[fate])
    if fate not in ("root", "probe"):
        label.append(f"  {percent(node['target_prob'])}")
    for words in _reason(view, number, fate):
        label.append(f"  {words}")
    return label


def _reason(view: StepView, number: int, fate: str) -> Iterator[str]:
    from haast.bench.trace_view import percent, quoted

    choice = view.nodes[view.nodes[number]["parent"]]["choice"] if number else None
    if fate == "rejected" and choice is not None:
        same = choice["token"] == view.nodes[number]["token"]
        yield "twin" if same else f"the target said {quoted(choice['text'])} ({percent(choice['prob'])})"
    elif fate == "unreached":
        yield "not reached"
    elif fate == "cut":
        yield "the text ended before it"
    elif fate == "probe":
        yield "probe"


def _bonus(choice: Mapping[str, Any]) -> Text:
    from rich.text import Text

    from haast.bench.trace_view import percent, visible

    return Text(f"+ {visible(choice['text'])}  {percent(choice['prob'])}  the target's own", style="bold")
