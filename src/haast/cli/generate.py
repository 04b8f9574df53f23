"""`haast generate` and `haast chat`: print text while it is generated. Owns the terminal; `haast.api` decodes."""

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
from haast.cli.loading import Spreading, is_leader, load_chosen, only_leader_prints
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
    from haast.target.device_map import Placement

_GREEN, _RESET = "\x1b[32m", "\x1b[0m"
_WARMUP = 8  # tokens


@dataclass(frozen=True)
class Ending:
    """When a text ends, and how it is printed."""

    max_new_tokens: Annotated[int, Option(metavar="N", help="Exact upper bound of new tokens.")] = 256
    stop: Annotated[list[str] | None, Option(metavar="TEXT", help="Stop string; may be repeated.")] = None
    prefill_chunk: ChunkOption = PREFILL_CHUNK
    plain: Annotated[bool, Option("--plain", help="Don't print drafted tokens in green.")] = False

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments for `Haast.stream`."""
        limits = {"max_new_tokens": self.max_new_tokens, "prefill_chunk": self.prefill_chunk}
        return {**limits, "stop": self.stop or ()}

    def coloured(self, out: TextIO) -> bool:
        """Whether drafted tokens are printed in green on `out`."""
        return not self.plain and out.isatty()

    def check(self) -> None:
        """Raises ValueError for an impossible setting."""
        check_at_least("max_new_tokens", self.max_new_tokens)
        check_at_least("prefill_chunk", self.prefill_chunk)
        if any(not text for text in self.stop or ()):
            raise ValueError("an empty --stop string would end every answer at once: leave it out")


@dataclass
class StreamedText:
    """The text and tokens received so far, which remain after an interrupt."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)

    def consume(self, pieces: Iterable[Piece], out: TextIO | None, colour: bool) -> None:
        """Collect the pieces, and print each on `out` as it arrives."""
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
    raw: Annotated[bool, Option("--raw", help="Don't apply the chat template.")] = False,
    compare: Annotated[bool, Option("--compare", help="Compare with decoding without drafts.")] = False,
    rounds: Annotated[int, Option(metavar="R", help="With --compare: timed runs of each decoder.")] = 1,
    json_out: JsonOption = None,
) -> None:
    """Answer one prompt and stream the text. Accepted drafted tokens are green.

    \b
    haast generate "Why is the sky blue?"
    haast generate "Why is the sky blue?" --compare --max-new-tokens 128
    haast generate "Once upon a time" --raw --temperature 0.8 --seed 7 --json out.json
    """
    ending.check()
    check_at_least("rounds", rounds)
    params = sampling.check()
    loading.check()
    placement = spreading.check(loading)
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise ValueError("the prompt is empty: give some text")
    check_writable(json_out)
    if compare and choice.drafter in ("none", "vanilla"):
        raise ValueError(f"--compare needs a drafter to compare: leave out --drafter {choice.drafter}")
    model = _load(loading, choice, drafting, placement)
    json_out = json_out if is_leader(model.target) else None
    with only_leader_prints(model.target):
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
    system: Annotated[str, Option(metavar="TEXT", help="System message of the dialogue.")] = "",
) -> None:
    """Chat with the model. /reset starts a new dialogue, /exit (or end of input) quits, Ctrl-C stops an answer.

    \b
    haast chat
    haast chat --temperature 0.7 --seed 1 --system "Answer in one sentence."
    """
    ending.check()
    params = sampling.check()
    loading.check()
    if spreading.tensor_parallel:
        raise ValueError("chat does not support --tensor-parallel: use `haast generate`")
    model = _load(loading, choice, drafting, spreading.check(loading))
    if not model.tokenizer.chat_template:
        raise ValueError(f"{loading.model} has no chat template, which chat needs: use `haast generate --raw`")
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
                # Closing the stream adds the answer to the dialogue, even if Ctrl-C stopped it.
                with closing(session.stream(line, sampling=params, **ending.settings)) as pieces:
                    StreamedText().consume(pieces, sys.stdout, ending.coloured(sys.stdout))
                typer.echo()
            except PromptError as error:  # the dialogue is unchanged
                typer.echo(f"haast: this dialogue is too long: {error}; /reset starts a new one", err=True)
            except KeyboardInterrupt:
                typer.echo(" [cut short]")


def _load(loading: Loading, choice: Choice, drafting: Drafting, placement: Placement) -> Haast:
    from haast.api import Haast

    return Haast(*load_chosen(choice, loading, drafting, placement))


def _answer(
    model: Haast, prompt: Prompt, params: SamplingParams, ending: Ending, chat: bool, out: TextIO | None
) -> tuple[StreamedText, Stats]:
    """Generate one answer and print it on `out`, then statistics on stderr, also after Ctrl-C."""
    from haast.engine.engine import Stats

    streamed, stats = StreamedText(), Stats()
    pieces = model.stream(prompt, sampling=params, chat=chat, stats=stats, **ending.settings)
    try:
        streamed.consume(pieces, out, out is not None and ending.coloured(out))
    finally:
        if out is not None:
            out.write("\n")
            out.flush()
            summary = f"{stats.tokens} tokens, {stats.tokens_per_s:.1f} tokens/s, tau {stats.tau:.2f}"
            depths = " ".join(f"{value:.2f}" for value in stats.acceptance_by_depth)
            typer.echo(f"[{summary}{', acceptance by depth ' * bool(depths)}{depths}]", err=True)
    return streamed, stats


def _compare(
    model: Haast, prompt: str, params: SamplingParams, ending: Ending, chat: bool, rounds: int, json_out: str | None
) -> None:
    """Decode one prompt vanilla and with drafting; rounds after the first print nothing and alternate the order."""
    from haast.api import Haast
    from haast.checking.divergence import diagnose
    from haast.drafters.vanilla import VanillaDrafter

    out, drafted, vanilla = human_output(json_out), model.drafter.name, Haast(model.target, VanillaDrafter())
    warmup = replace(ending, max_new_tokens=min(_WARMUP, ending.max_new_tokens))
    models = [("vanilla", vanilla), (drafted, model)]
    for _, each in models:
        _answer(each, prompt, params, warmup, chat, None)
    runs: dict[str, list[tuple[StreamedText, Stats]]] = {name: [] for name, _ in models}
    for number in range(rounds):
        for name, each in models if number % 2 == 0 else reversed(models):
            if number == 0:
                out.write(f"--- {name}\n")
            runs[name].append(_answer(each, prompt, params, ending, chat, out if number == 0 else None))
    speeds = {name: median(stats.tokens_per_s for _, stats in answers) for name, answers in runs.items()}
    speedup = speeds[drafted] / speeds["vanilla"] if speeds["vanilla"] else 0.0
    tau = runs[drafted][0][1].tau
    texts = {name: [streamed.tokens for streamed, _ in answers] for name, answers in runs.items()}
    same = all(tokens == texts["vanilla"][0] for outputs in texts.values() for tokens in outputs)
    out.write("--- the same text" if same else "--- NOT the same text")
    of_runs = f" (medians of {rounds} runs)" if rounds > 1 else ""
    out.write(f": speed-up {speedup:.2f}x{of_runs}, tau {tau:.2f} tokens per target forward\n")
    kind = None
    if not same:
        expected = texts["vanilla"][0]
        other = next(tokens for outputs in texts.values() for tokens in outputs if tokens != expected)
        difference = diagnose(model.target, model.encode(prompt, chat), expected, other, params)
        assert difference is not None, "the texts differ"
        kind, gaps = difference.kind, f"gap {difference.gap:.2g}, a tie is at most {difference.allowed:.2g}"
        out.write(f"first difference at token {difference.index}: {kind} ({gaps})\n")
    document: dict[str, Any] = {name: _document(*answers[0]) for name, answers in runs.items()}
    document |= {"same": same, "kind": kind, "speedup": speedup, "tau": tau, "tokens_per_s": speeds, "rounds": rounds}
    write_json(document, json_out)
    if kind == "bug":
        raise typer.Exit(1)


def _document(streamed: StreamedText, stats: Stats) -> dict[str, Any]:
    from haast.bench.report import stats_document

    return {"text": streamed.text, "tokens": streamed.tokens, "stats": stats_document(stats)}
