"""Draw the demo as a moving picture: one prompt by EAGLE and by vanilla decoding, at the times at which tokens came.

python examples/demo_svg.py "Why is the sky blue?"

It records into results/demo.json and draws docs/demo.svg from that; without a prompt it draws again.

Accepted drafts are green, the model's own tokens are plain. The SVG needs no script and no network; where a reader has
asked for less motion it stands still, with both texts whole.
"""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from haast import Haast, Stats
from haast.bench.report import machine
from haast.files import write_json, write_text

RECORDING, PICTURE = Path("results/demo.json"), Path("docs/demo.svg")
COLUMNS, LINES = 84, 9  # of each panel, in characters
CELL, LINE, MARGIN = 8.43, 19.0, 18.0  # px
PAUSE, SLOWER = 4.0, 4.0  # seconds at the end of each round; how many times as slow as it was, so that eyes can follow
STYLE = """
text { font: 14px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre; fill: #e6e6e6 }
.d { fill: #5fd787 } .t { fill: #9a9a9a } .b { font-weight: bold }
"""


@dataclass(frozen=True)
class Panel:
    """One decoder's answer: (second, text, whether it was drafted) of each piece."""

    title: str
    pieces: list[tuple[float, str, bool]]
    tokens_per_s: float
    tau: float

    @property
    def seconds(self) -> float:
        return self.pieces[-1][0]


def record(haast: Haast, title: str, prompt: str, tokens: int) -> Panel:
    """Answer once to warm up, then once to be drawn."""
    pieces, stats = list[tuple[float, str, bool]](), Stats()
    haast.generate(prompt, max_new_tokens=8)
    begin = time.perf_counter()
    for piece in haast.stream(prompt, max_new_tokens=tokens, stats=stats):
        pieces.append((round(time.perf_counter() - begin, 4), piece.text, piece.drafted))
    return Panel(title, pieces, stats.tokens / pieces[-1][0], stats.tau)


def draw(panel: Panel, top: float, whole: float) -> tuple[list[str], list[str]]:
    """The panel's elements, and the keyframes of its steps; a round of the animation lasts `whole` seconds."""
    elements = [f'<text class="b" x="{MARGIN}" y="{top}">{escape(panel.title)}</text>']
    frames, column, line = list[str](), 0, 1
    moments = sorted({when for when, _, _ in panel.pieces})
    steps = {when: f"{panel.title[0]}{number}" for number, when in enumerate(moments)}
    for when, name in steps.items():
        at = 100 * SLOWER * when / whole
        frames.append(f"@keyframes {name}{{0%,{at:.2f}%{{opacity:0}}{at + 0.01:.2f}%,100%{{opacity:1}}}}")
        frames.append(f".{name}{{animation:{name} {whole:.1f}s infinite}}")
    for when, text, drafted in panel.pieces:
        for word in re.findall(r" *[^ ]+| +$", text.replace("\n", " ")):
            if column + len(word) > COLUMNS:
                column, line, word = 0, line + 1, word.lstrip()
            if word and line < LINES:
                x, y = MARGIN + column * CELL, top + line * LINE
                kind = f"{steps[when]} d" if drafted else steps[when]
                elements.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(word)}</text>')
            column += len(word)
    last = steps[moments[-1]]
    total = f"{panel.tokens_per_s:.0f} tokens/s, {panel.tau:.2f} tokens per forward of the model"
    elements.append(f'<text class="t {last}" x="{MARGIN}" y="{top + LINES * LINE:.1f}">{total}</text>')
    return elements, frames


def picture(prompt: str, panels: list[Panel]) -> str:
    """The SVG."""
    whole = SLOWER * max(panel.seconds for panel in panels) + PAUSE
    head = f'<text class="t" x="{MARGIN}" y="30">&gt; {escape(prompt)}</text>'
    elements, frames, top = [head], list[str](), 62.0
    for panel in panels:
        own, moving = draw(panel, top, whole)
        elements, frames, top = elements + own, frames + moving, top + (LINES + 1.6) * LINE
    note = f"green: drafted and accepted; {SLOWER:.0f} times as slow as it was"
    elements.append(f'<text class="t" x="{MARGIN}" y="{top - 6:.1f}">{note}</text>')
    width, height = 2 * MARGIN + COLUMNS * CELL, top + 12
    motion = f"@media (prefers-reduced-motion: no-preference) {{ {' '.join(frames)} }}"
    box = f'<rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="#1c1c1c"/>'
    body = "\n".join([f"<style>{STYLE}{motion}</style>", f"<title>{escape(prompt)}</title>", box, *elements])
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}">\n{body}\n</svg>\n'


def drawn(document: dict[str, Any]) -> str:
    """The picture of a recording."""
    return picture(document["prompt"], [Panel(**panel) for panel in document["panels"]])


def main(prompt: str | None = None) -> None:
    """Record both decoders if there is a prompt, and draw what is recorded."""
    if prompt is not None:
        models = {"EAGLE": Haast.from_pretrained(), "vanilla": Haast.from_pretrained(drafter="none")}
        panels = [asdict(record(model, title, prompt, 96)) for title, model in models.items()]
        target = models["EAGLE"].target
        about = machine() | {"command": f'python examples/demo_svg.py "{prompt}"', "packing": target.packing}
        write_json({"kind": "demo", "prompt": prompt, "panels": panels, "environment": about}, RECORDING)
    write_text(PICTURE, drawn(json.loads(RECORDING.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main(*sys.argv[1:2])
