"""matplotlib's SVG made fit to stand inside a page: no addresses, no style of its own, its ids apart from others'.

Owns the tokens that stand for colours while matplotlib draws; in the page they are CSS variables, so that one picture
serves light and dark. The output depends on the drawing and its name only, not on the day.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that no one would choose: each stands for a variable of page.css.
INK, SOFT, RULE, PAPER, WASH = "#010203", "#010204", "#010205", "#010206", "#010207"
SERIES = tuple(f"#0102{16 + number:02x}" for number in range(8))
_VARIABLES = {INK: "ink", SOFT: "soft", RULE: "rule", PAPER: "paper", WASH: "wash"} | {
    colour: f"c{number}" for number, colour in enumerate(SERIES)
}
_DROPPED = (
    r"<metadata>.*?</metadata>",
    r"<style[^>]*>.*?</style>",  # would rule the whole page
    r"<!--.*?-->",
    r' xmlns(:\w+)?="[^"]*"',
    r"<defs>\s*</defs>",
)


@contextmanager
def drawing(name: str, size: float) -> Iterator[None]:
    """Within it matplotlib draws for `inline`: text as text, ids by `name`, letters of `size` points."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": size, "text.parse_math": False,
        "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": RULE, "axes.titlesize": size + 1,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": size, "xtick.color": RULE,
        "ytick.color": RULE, "xtick.labelcolor": SOFT, "ytick.labelcolor": INK, "axes.facecolor": "none",
        "figure.facecolor": "none", "hatch.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has fonts of its own
        yield


def inline(figure: Figure, name: str) -> str:
    """A figure drawn within `drawing(name, ...)` as an `<svg class="plot">` element."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for pattern in _DROPPED:
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None, "matplotlib writes a viewBox"
    text = re.sub(
        r"<svg[^>]*>", f'<svg class="plot" viewBox="{box[1]}" aria-hidden="true" focusable="false">', text, count=1
    )
    text = re.sub(r"font: ?(?:(\d+|bold) )?([\d.]+)px [^;\"]*", _font, text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return _named(text, name).strip()


def _font(found: re.Match[str]) -> str:
    weight = f"; font-weight: {found[1]}" if found[1] else ""
    return f"font-size: {found[2]}px{weight}"


def _named(text: str, name: str) -> str:
    """Keep the ids that something points to, under this figure's name."""
    used = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', text))
    prefix = escape(name)

    def kept(found: re.Match[str]) -> str:
        return f' id="{prefix}-{found[1]}"' if found[1] in used else ""

    text = re.sub(r' id="([^"]*)"', kept, text)
    return re.sub(r'(xlink:href="|url\()#', lambda found: f"{found[1].replace('xlink:', '')}#{prefix}-", text)
