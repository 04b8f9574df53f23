"""Draws one answer as an SVG: accepted drafts in green, the target's own tokens in white.

python examples/coloured_answer.py "Why is the sky blue?" docs/accepted.svg
"""

from __future__ import annotations

import io
import sys

from rich.console import Console
from rich.text import Text

from haast import Haast, Stats


def main(prompt: str, path: str) -> None:
    haast, stats, text = Haast.from_pretrained(), Stats(), Text()
    for piece in haast.stream(prompt, max_new_tokens=96, stats=stats):
        text.append(piece.text, style="bold green" if piece.drafted else "white")
    console = Console(record=True, width=88, file=io.StringIO())
    console.print(Text("> " + prompt + "\n", style="bold"))
    console.print(text)
    console.print(
        Text(f"\n{stats.tokens} tokens in {stats.target_forwards} target forwards: tau {stats.tau:.2f}", style="dim")
    )
    console.save_svg(path, title="green: drafted and accepted; white: the target's own token")


if __name__ == "__main__":
    main(*sys.argv[1:3])
