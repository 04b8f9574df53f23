"""`haast generate` and `haast chat`: text as it is accepted. Owns the terminal; decoding is `haast.api`'s."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer import Option

from haast.cli.boundary import human_output
from haast.cli.loading import Spreading, leads, load_chosen, one_voice
from haast.cli.settings import (
    PREFILL_CHUNK,
    Choice,
    ChunkOption,
    Drafting,
    JsonOption,
    Loading,
    Sampling,
    check_at_least,
)
from haast.files import check_writable, write_json

if TYPE_CHECKING:
    from haast.api import Haast, Piece, Prompt
    from haast.core import SamplingParams
    from haast.engine.engine import Stats
    from haast.target.device_map import Spread

_GREEN, _RESET = "\x1b[32m", "\x1b[0m"
_WARMUP = 8  # tokens


@dataclass(frozen=True)
class Ending:
    """How long a text goes on, and how it is shown."""

    max_new_tokens: Annotated[int, Option(metavar="N", help="Exact upper bound of new tokens.")] = 256
    stop: Annotated[list[str] | None, Option(metavar="TEXT", help="End before this text; may be repeated.")] = None
    prefill_chunk: ChunkOption = PREFILL_CHUNK
    plain: Annotated[bool, Option("--plain", help="Don't colour drafted tokens (green).")] = False

    @property
    def settings(self) -> dict[str, Any]:
        """As keywords of `Haast.stream`."""
        length = {"max_new_tokens": self.max_new_tokens, "prefill_chunk": self.prefill_chunk}
        return {**length, "stop": self.stop or ()}

    def coloured(self, out: TextIO) -> bool:
        """Whether drafted tokens are shown in green there."""
        return not self.plain and out.isatty()

    def check(self) -> None:
        """Raises ValueError."""
        check_at_least("max_new_tokens", self.max_new_tokens)
        check_at_least("prefill_chunk", self.prefill_chunk)
        if any(not text for text in self.stop or ()):
            raise ValueError("an empty --stop text would end every answer at once: leave it out")


@dataclass
class Said:
    """What was said so far; it stays when an interrupt comes."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)

    def listen(self, pieces: Iterable[Piece], out: TextIO | None, colour: bool) -> None:
        """Take in pieces as they come, showing them on `out`."""
        for piece in pieces:
            self.text += piece.text
            self.tokens.extend(piece.tokens)
            if out is not None and piece.text:
                out.write(f"{_GREEN}{piece.text}{_RESET}" if colour and piece.drafted else piece.text)
                out.flush()


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from stdin.")],
    loading: Loading,
    choice: Choice,
    drafting: Drafting,
    sampling: Sampling,
    ending: Ending,
    spreading: Spreading,
    raw: Annotated[bool, Option("--raw", help="Don't put the prompt through the chat template.")] = False,
    compare: Annotated[bool, Option("--compare", help="Decode without drafting first, then with it.")] = False,
    rounds: Annotated[int, Option(metavar="R", help="With --compare: timed runs of each.")] = 1,
    json_out: JsonOption = None,
) -> None:
    """Answer one prompt, streamed; drafted tokens are green, the target's own are not.

    \b
    haast generate "Why is the sky blue?"
    haast generate "Why is the sky blue?" --compare --max-new-tokens 128
    haast generate "Once upon a time" --raw --temperature 0.8 --seed 7 --json out.json
    """
    ending.check()
    check_at_least("rounds", rounds)
    params = sampling.check()
    loading.check()
    spread = spreading.check(loading)
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise ValueError("the prompt is empty: give some text")
    check_writable(json_out)
    if compare and choice.drafter in ("none", "vanilla"):
        raise ValueError(f"--compare compares a drafter with none: leave out --drafter {choice.drafter}")
    model = _load(loading, choice, drafting, spread)
    json_out = json_out if leads(model.target) else None
    with one_voice(model.target):
        if compare:
            _compare(model, prompt, params, ending, not raw, rounds, json_out)
        else:
            write_json(_document(*_answer(model, prompt, params, ending, not raw, human_output(json_out))), json_out)


def chat(
    loading: Loading,
    choice: Choice,
    drafting: Drafting,
    sampling: Sampling,
    ending: Ending,
    spreading: Spreading,
    system: Annotated[str, Option(metavar="TEXT", help="A system message to begin with.")] = "",
) -> None:
    """Talk with the model. /reset forgets the dialogue, /exit (or end of input) leaves, Ctrl-C cuts an answer short.

    \b
    haast chat
    haast chat --temperature 0.7 --seed 1 --system "Answer in one sentence."
    """
    ending.check()
    params = sampling.check()
    loading.check()
    if spreading.tensor_parallel:
        raise ValueError("--tensor-parallel answers one prompt (`haast generate`): several processes can't hear you")
    model = _load(loading, choice, drafting, spreading.check(loading))
    if not model.tokenizer.chat_template:
        raise ValueError(f"{loading.model} has no chat template, so it cannot chat: use `haast generate --raw`")
    from haast.errors import PromptError
    from haast.session import Session

    beginning = [{"role": "system", "content": system}] if system else []
    session = Session(model, beginning)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo()
            return
        if line == "/exit":
            return
        if line == "/reset":
            session.messages = list(beginning)
        elif line:
            try:
                # Cut short or not, what was said joins the dialogue when the stream is closed.
                with closing(session.stream(line, sampling=params, **ending.settings)) as pieces:
                    Said().listen(pieces, sys.stdout, ending.coloured(sys.stdout))
                typer.echo()
            except PromptError as error:  # the dialogue stays as it was
                typer.echo(f"haast: this dialogue is too long: {error}; /reset begins a new one", err=True)
            except KeyboardInterrupt:
                typer.echo(" [cut short]")


def _load(loading: Loading, choice: Choice, drafting: Drafting, spread: Spread) -> Haast:
    from haast.api import Haast

    return Haast(*load_chosen(choice, loading, drafting, spread))


def _answer(
    model: Haast, prompt: Prompt, params: SamplingParams, ending: Ending, chat: bool, out: TextIO | None
) -> tuple[Said, Stats]:
    """One answer, shown on `out`, with its line of statistics on stderr; Ctrl-C prints it as well."""
    from haast.engine.engine import Stats

    said, stats = Said(), Stats()
    pieces = model.stream(prompt, sampling=params, chat=chat, stats=stats, **ending.settings)
    try:
        said.listen(pieces, out, out is not None and ending.coloured(out))
    finally:
        if out is not None:
            out.write("\n")
            out.flush()
            words = f"{stats.tokens} tokens, {stats.tokens_per_s:.1f} tokens/s, tau {stats.tau:.2f}"
            depths = " ".join(f"{value:.2f}" for value in stats.acceptance_by_depth)
            typer.echo(f"[{words}{', acceptance by depth ' * bool(depths)}{depths}]", err=True)
    return said, stats


def _compare(
    model: Haast, prompt: str, params: SamplingParams, ending: Ending, chat: bool, rounds: int, json_out: str | None
) -> None:
    """Vanilla, then drafted, on one prompt; further rounds are silent and in alternating order."""
    from haast.api import Haast
    from haast.checking.divergence import diagnose
    from haast.drafters.vanilla import VanillaDrafter

    out, own, vanilla = human_output(json_out), model.drafter.name, Haast(model.target, VanillaDrafter())
    warm = replace(ending, max_new_tokens=min(_WARMUP, ending.max_new_tokens))
    arms = [("vanilla", vanilla), (own, model)]
    for _, arm in arms:
        _answer(arm, prompt, params, warm, chat, None)
    runs: dict[str, list[tuple[Said, Stats]]] = {name: [] for name, _ in arms}
    for number in range(rounds):
        for name, arm in arms if number % 2 == 0 else reversed(arms):
            if number == 0:
                out.write(f"--- {name}\n")
            runs[name].append(_answer(arm, prompt, params, ending, chat, out if number == 0 else None))
    speeds = {name: median(stats.tokens_per_s for _, stats in done) for name, done in runs.items()}
    speedup = speeds[own] / speeds["vanilla"] if speeds["vanilla"] else 0.0
    tau = runs[own][0][1].tau
    texts = {name: [said.tokens for said, _ in done] for name, done in runs.items()}
    same = all(tokens == texts["vanilla"][0] for done in texts.values() for tokens in done)
    out.write("--- the same text" if same else "--- NOT the same text")
    out.write(f": speed-up {speedup:.2f}x, tau {tau:.2f} tokens per target forward\n")
    kind = None
    if not same:
        wanted = texts["vanilla"][0]
        other = next(tokens for done in texts.values() for tokens in done if tokens != wanted)
        found = diagnose(model.target, model.encode(prompt, chat), wanted, other, params)
        assert found is not None, "the texts differ"
        kind, gaps = found.kind, f"gap {found.gap:.2g}, a tie up to {found.allowed:.2g}"
        out.write(f"first difference at token {found.index}: {kind} ({gaps})\n")
    document: dict[str, Any] = {name: _document(*done[0]) for name, done in runs.items()}
    document |= {"same": same, "kind": kind, "speedup": speedup, "tau": tau, "tokens_per_s": speeds, "rounds": rounds}
    write_json(document, json_out)
    if kind == "bug":
        raise typer.Exit(1)


def _document(said: Said, stats: Stats) -> dict[str, Any]:
    from haast.bench.report import stats_document

    return {"text": said.text, "tokens": said.tokens, "stats": stats_document(stats)}
