"""`haast trace`: for one prompt, shows what each step drafted and accepted, and why it rejected the rest.

Owns the terminal output. `bench.trace` records the steps, `bench.page` renders the page.
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

_STYLES = {  # fate of a node -> sign, rich style
    "root": ("", "bold"), "accepted": ("\u2713 ", "green"), "cut": ("\u2713 ", "green"), "rejected": ("\u2717 ", "dim"),
    "unreached": ("  ", "dim"), "probe": ("? ", "dim italic"),
}  # fmt: skip
_REASONS = {
    "rejected": "the target chose {choice} ({likely})", "twin": "duplicate", "unreached": "not reached",
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
            help="auto, eagle, eagle+suffix, block, block+suffix, medusa, small-model, lookahead, lookup, suffix or "
            "none.",
        ),
    ] = "auto",
    small_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Draft model for --drafter small-model.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Exact upper bound of new tokens.")] = 32,
    raw: Annotated[bool, typer.Option("--raw", help="Don't apply the chat template.")] = False,
    html_out: Annotated[
        str | None, typer.Option("--html", metavar="OUT", help="Also write it as a self-contained HTML page.")
    ] = None,
    json_out: JsonOption = None,
) -> None:
    """Show each step's draft tree: what was accepted, and what the target chose instead of the rest.

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
            f"drafter={drafter!r} can't be traced: give a drafter of Haast's engine with sample-and-match verification"
        )
    loading.check()
    target, drafts = load_chosen(Choice(drafter, small_model), loading, drafting)
    model, dtype = Haast(target, VanillaDrafter()), str(target.dtype).removeprefix("torch.")
    environment = machine() | {"model": loading.model, "dtype": dtype, "packing": target.packing}
    stop = StopParams(max_new_tokens, model.eos_ids())
    document = record_trace(target, drafts, model.encode(prompt, chat=not raw), params, stop, prompt, environment)

    from rich.console import Console

    out = human_output("-" if html_out == "-" else json_out)
    show_trace(document, Console(file=out, highlight=False, width=None if out.isatty() else 120))
    write_json(document, json_out)
    if html_out is not None:
        write_text(html_out, trace_html(document))


def _checked(prompt: str, html_out: str | None, json_out: str | None) -> str:
    """The prompt, read from stdin for '-'. Raises ValueError if it is empty, or a result can't be written."""
    prompt = sys.stdin.read() if prompt == "-" else prompt
    if not prompt:
        raise ValueError("the prompt is empty: give some text")
    check_writable(json_out)
    check_writable(html_out)
    if html_out == "-" == json_out:
        raise ValueError("--html - and --json - both write to stdout: write one of them to a file")
    return prompt


def show_trace(document: Mapping[str, Any], console: Console) -> None:
    """Print the text with its drafted tokens in colour, then every step's tree."""
    from rich.text import Text
    from rich.tree import Tree

    from haast.bench.trace import StepView, percent, visible

    def label(view: StepView, number: int) -> Text:
        node, fate = view.nodes[number], view.fate(number)
        sign, style = _STYLES[fate]
        prob = None if fate in ("root", "probe") else percent(node["target_prob"])
        return Text("  ".join(filter(None, [sign + visible(node["text"]), prob, view.why(number, _REASONS)])), style)

    def grow(branch: Tree, view: StepView, number: int) -> Tree:
        for child in view.children[number]:
            grow(branch.add(label(view, child)), view, child)
        bonus = view.bonus()
        if bonus is not None and bonus[0] == number:
            words = f"+ {visible(bonus[1]['text'])}  {percent(bonus[1]['prob'])}  bonus token"
            branch.add(Text(words, style="bold"))
        return branch

    text = Text(document["prefill"]["text"], style="bold")  # bonus tokens are bold, accepted drafts green
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
