"""`haast trace`: one prompt, and for every step what was drafted, what was accepted, and why the rest was not.

Owns the terminal's view. The recording is `bench.trace`'s, the page `bench.page`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haast.cli.boundary import human_output
from haast.cli.loading import load_chosen
from haast.cli.settings import Choice, Drafting, JsonOption, Loading, Sampling, check_at_least
from haast.files import check_writable, write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console

_LOOKS = {  # by fate: a sign, a style
    "root": ("", "bold"), "accepted": ("\u2713 ", "green"), "cut": ("\u2713 ", "green"), "rejected": ("\u2717 ", "dim"),
    "unreached": ("  ", "dim"), "probe": ("? ", "dim italic"),
}  # fmt: skip
_REASONS = {
    "rejected": "the target said {choice} ({likely})", "twin": "twin", "unreached": "not reached",
    "cut": "the text ended before it", "probe": "probe",
}  # fmt: skip


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
    prompt = _checked(prompt, html_out, json_out)
    params = sampling.check()

    from haast.api import Haast
    from haast.bench.decoders import DECODERS
    from haast.bench.page import trace_html
    from haast.bench.report import machine
    from haast.bench.trace import record_trace
    from haast.drafters.factory import NAMES
    from haast.drafters.vanilla import VanillaDrafter
    from haast.engine.engine import StopParams

    if drafter not in (*NAMES, "vanilla") and (drafter in DECODERS or "," in drafter):
        raise ValueError(
            f"drafter={drafter!r} can't be traced: give one that runs in Haast's engine, by sample-and-match"
        )
    loading.check()
    target, drafts = load_chosen(Choice(drafter, small_model), loading, drafting)
    model, dtype = Haast(target, VanillaDrafter()), str(target.dtype).removeprefix("torch.")
    where = machine() | {"model": loading.model, "dtype": dtype, "packing": target.packing}
    rules = StopParams(max_new_tokens, model.eos_ids())
    document = record_trace(target, drafts, model.encode(prompt, chat=not raw), params, rules, prompt, where)

    from rich.console import Console

    out = human_output("-" if html_out == "-" else json_out)
    show_trace(document, Console(file=out, highlight=False, width=None if out.isatty() else 120))
    write_json(document, json_out)
    if html_out is not None:
        write_text(html_out, trace_html(document))


def _checked(prompt: str, html_out: str | None, json_out: str | None) -> str:
    """The prompt. Raises ValueError where it is empty, or a result can't be written."""
    prompt = sys.stdin.read() if prompt == "-" else prompt
    if not prompt:
        raise ValueError("the prompt is empty: give some text")
    check_writable(json_out)
    check_writable(html_out)
    if html_out == "-" == json_out:
        raise ValueError("--html - and --json - both ask for stdout: write one of them to a file")
    return prompt


def show_trace(document: Mapping[str, Any], console: Console) -> None:
    """The text with its drafted tokens in colour, then every step's tree."""
    from rich.text import Text
    from rich.tree import Tree

    from haast.bench.trace import StepView, percent, visible

    def label(view: StepView, number: int) -> Text:
        node, fate = view.nodes[number], view.fate(number)
        sign, style = _LOOKS[fate]
        chance = None if fate in ("root", "probe") else percent(node["target_prob"])
        return Text("  ".join(filter(None, [sign + visible(node["text"]), chance, view.why(number, _REASONS)])), style)

    def grow(branch: Tree, view: StepView, number: int) -> Tree:
        for child in view.children[number]:
            grow(branch.add(label(view, child)), view, child)
        bonus = view.bonus()
        if bonus is not None and bonus[0] == number:
            own = f"+ {visible(bonus[1]['text'])}  {percent(bonus[1]['prob'])}  the target's own"
            branch.add(Text(own, style="bold"))
        return branch

    text = Text(document["prefill"]["text"], style="bold")  # the target's own tokens bold, accepted drafts green
    for token in (token for step in document["steps"] for token in step["emitted"]):
        text.append(token["text"], style="not bold green" if token["drafted"] else "bold")
    console.print(text)
    tau = f"tau {document['tau']:.2f}" if document["target_forwards"] else "no step was taken"
    counts = f"{document['tokens']} tokens, {document['target_forwards']} target forwards"
    console.print(
        Text(f"\n{document['decoder']}: {counts}, {tau}; probabilities are the target's, {document['probabilities']}")
    )
    for number, step in enumerate(document["steps"], start=1):
        view = StepView(step)
        console.print(Text(f"\nstep {number}: {view.summary()}", style="bold"))
        console.print(grow(Tree(label(view, 0), guide_style="dim"), view, 0))
