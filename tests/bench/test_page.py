"""The page: whole, self-contained, escaped, the same every time; and in a headless Chromium without a complaint."""

from __future__ import annotations

import builtins
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pages import NASTY, suite_document, trace_document

from haast.bench.page import report_html, trace_html
from haast.bench.tables import main_rows

FIGURES = ["speedup", "tau", "acceptance", "lengths", "milliseconds", "nodes"]
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Outline(HTMLParser):
    """Checks that elements close in order; gathers ids, references, loads and visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def ids(self, tag: str | None = None) -> list[str]:
        return [str(own["id"]) for name, own in self.elements if "id" in own and tag in (None, name)]


@pytest.fixture(scope="module")
def report() -> str:
    return report_html(suite_document())


def test_the_report_is_whole(report: str) -> None:
    page = Outline(report)
    assert page.ids("figure") == FIGURES
    assert [name for name, _ in page.elements].count("figcaption") == len(FIGURES)
    assert len(page.ids()) == len(set(page.ids())), "an id twice"
    pointed = re.findall(r'(?:href="|url\()#([^")]+)', report)
    assert pointed and set(pointed) <= set(page.ids()), "something points to what is not there"
    labels = [own for _, own in page.elements if own.get("role") in ("img", "region", "group")]
    assert labels and all(own.get("aria-label") for own in labels)
    assert len(report.encode()) < 2_000_000


def test_every_number_of_the_figures_stands_in_a_table(report: str) -> None:
    document = suite_document()
    cells = set(re.findall(r"<td[^>]*>([^<]*)</td>", report))
    assert {f"{each['ratio']:.2f}\u00d7" for each in document["ratios"]} <= cells
    assert {f"{row['tau']:.2f}" for row in document["rows"]} <= cells
    assert {f"{row['ms_verify']:.2f}" for row in document["rows"]} <= cells
    assert {f"{each['tau']:.2f}" for row in main_rows(document, 0.0) for each in row["by_length"]} <= cells
    assert "with 95% bootstrap intervals" in report and "medusa (lossy)" in cells


def test_nothing_is_loaded(report: str) -> None:
    for page in (report, trace_html(trace_document())):
        assert not re.search(r"https?:|//[a-z]+\.[a-z]", page.split("<body>")[1], re.IGNORECASE)
        elements = Outline(page).elements
        loaded = [own for _, own in elements if "src" in own]
        loaded += [own for name, own in elements if name == "link" and own["href"] != "data:,"]
        assert not loaded and "@import" not in page and "default-src 'none'" in page


def test_what_documents_say_stays_text(report: str) -> None:
    document = trace_document()
    document["environment"]["command"] = document["decoder"] = NASTY
    document["text"] = document["prefill"]["text"] = "</a></p><img src=x onerror=alert(1)>"
    for page in (report, trace_html(document)):
        outline = Outline(page)
        assert [name for name, _ in outline.elements].count("script") == 1
        assert NASTY in outline.text and not [name for name, _ in outline.elements if name in ("img", "cat")]


def test_hostile_names_of_suites_and_decoders_stay_text() -> None:
    document = suite_document(small=True)
    document["decoders"][NASTY] = document["decoders"].pop("suffix")
    document["suites"][NASTY] = document["suites"].pop("mt_bench")
    named = {"suffix": NASTY, "mt_bench": NASTY}
    for row in (*document["rows"], *document["ratios"]):
        row["decoder"], row["suite"] = (named.get(row[key], row[key]) for key in ("decoder", "suite"))
    page = Outline(report_html(document))
    assert [name for name, _ in page.elements].count("script") == 1 and page.ids("figure") == FIGURES


def test_a_lossy_decoder_is_hatched_and_never_the_headline(report: str) -> None:
    assert "<pattern" in report and "Hatched: lossy" in report
    document = suite_document(small=True)
    for ratio in document["ratios"]:
        if ratio["decoder"] == "medusa":
            ratio["ratio"] = 9.0
    page = report_html(document)
    lead = re.search(r'<p class="lead">(.*?)</p>', page)
    assert lead and "eagle+suffix" in lead[1] and "medusa" not in lead[1]
    document["decoders"].pop("medusa")
    document["rows"] = [row for row in document["rows"] if row["decoder"] != "medusa"]
    document["ratios"] = [row for row in document["ratios"] if row["decoder"] != "medusa"]
    assert "Hatched" not in report_html(document)


def test_colours_follow_the_theme(report: str) -> None:
    body = report.split("<body>")[1].split("<script>")[0]
    assert "var(--c0)" in body
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", body)) <= {"#ffffff", "#000000"}, "a colour that dark mode can't change"


def test_the_same_document_gives_the_same_page() -> None:
    assert report_html(suite_document(small=True)) == report_html(suite_document(small=True))


def test_without_calibration_a_sentence_stands_for_the_figure() -> None:
    document = suite_document(calibrated=False, traces=[], small=True)
    document["differences"] = []
    page = report_html(document)
    assert Outline(page).ids("figure") == FIGURES[:-1] and "had no calibration of this machine" in page
    assert "No answer differed" in page and 'id="trees"' not in page


@pytest.mark.parametrize("buckets", [None, 0, 1])
def test_lengths_need_two_to_compare(buckets: int | None) -> None:
    document = suite_document(small=True)
    for row in document["rows"]:
        found = row.pop("by_length")
        if buckets is not None:
            row["by_length"] = found[:buckets]
    page = report_html(document)
    assert Outline(page).ids("figure") == [name for name in FIGURES if name != "lengths"]
    assert "#lengths" not in page


def test_one_suite_and_a_decoder_outside_the_engine() -> None:
    document = suite_document(small=True)
    document["decoders"]["hf"] = {"lossy": False, "settings": {}}
    nothing = dict.fromkeys(("tau", "tau_loop_filtered", "ms_draft", "ms_verify", "ms_overhead", "nodes_per_forward"))
    empty: dict[str, Any] = {
        "decoder": "hf",
        "acceptance_by_depth": [],
        "alpha_by_depth": [],
        "tau_by_category": {},
        "spread": None,
    }
    document["rows"].append(document["rows"][0] | nothing | empty)
    document["ratios"].append(document["ratios"][0] | {"decoder": "hf", "ratio": 0.2, "low": 0.19, "high": 0.21})
    assert Outline(report_html(document)).ids("figure") == FIGURES


def test_trees_of_a_trace_page() -> None:
    page = trace_html(trace_document())
    outline = Outline(page)
    named = [str(own["class"]).split() for _, own in outline.elements if "class" in own]
    kinds = [words[1] for words in named if words[0] == "node"]
    assert sorted(set(kinds)) == ["accepted", "cut", "own", "probe", "rejected", "root", "unreached"]
    drafted = "drafted \u201c\u00b7<b>cat</b>\u201d (target 3 %)"
    reason = f"{drafted}: rejected, the target chose \u201c\u00b7sky\u201d (71 %)"
    assert f'title="{html.escape(reason)}"' in page
    assert ">dead<" not in page, "padding is not shown"
    assert '<a href="#t0s0"><span class="yes"> sky</span><span class="own"> is</span></a>' in page


def test_a_page_of_many_trees_stays_small() -> None:
    long = trace_document("Say it again.")
    long["steps"] = long["steps"][:1] * 500
    page = report_html(suite_document(traces=[long, long], small=True))
    assert len(page.encode()) < 2_000_000 and re.search(r"The trees of the last \d+ steps are only in the JSON", page)
    Outline(page)


@pytest.mark.parametrize("render", [report_html, trace_html])
def test_another_document_is_refused(render: Any) -> None:
    with pytest.raises(ValueError, match="format='haast-bench-9' is not"):
        render({"format": "haast-bench-9"})


def test_the_pages_need_no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    true_import = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return true_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert Outline(report_html(suite_document())).ids("figure") == FIGURES
    assert trace_html(trace_document())


# The outer page shows the report at two widths and writes down what it finds in them.
_PROBE = """<!DOCTYPE html><body><script>
window.addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    const size = (one) => one.getBoundingClientRect();
    const seen = (one) => size(one).width > 40 && size(one).height > 40;
    const step = () => page.querySelector(".step.now h4").textContent;
    const before = step();
    page.querySelectorAll(".stepper button")[1].click();
    const after = step();
    page.querySelectorAll(".stepper button")[0].click();
    const node = page.querySelector(".step.now .node.rejected");
    node.dispatchEvent(new FocusEvent("focusin", {bubbles: true}));
    const pictures = (one) => [...one.querySelectorAll(".plot")].filter(seen).length;
    const letters = [...page.querySelectorAll(".plot text")].map((one) => size(one).height).filter((tall) => tall);
    found[frame.id] = {
      overflow: root.scrollWidth - root.clientWidth,
      figures: [...page.querySelectorAll("figure")].filter((one) => pictures(one) === 1).map((one) => one.id),
      paper: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      smallest: Math.min(...letters),
      before: before, after: after, why: page.querySelector(".step.now .why").textContent,
    };
  }
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>
<iframe id="desk" src="report.html#light" width="1280" height="900"></iframe>
<iframe id="phone" src="report.html#dark" width="360" height="740"></iframe></body>"""


def test_a_browser_shows_it_without_a_complaint(report: str, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    (tmp_path / "report.html").write_text(report, encoding="utf-8")
    (tmp_path / "probe.html").write_text(_PROBE, encoding="utf-8")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    words += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([*words, f"file://{tmp_path / 'probe.html'}"], capture_output=True, text=True, timeout=240)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints
    said = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert said, done.stderr[-2000:]
    found = json.loads(html.unescape(said[1]))
    for seen in found.values():
        assert seen["figures"] == FIGURES, "one picture of each figure is shown"
        assert seen["overflow"] <= 0, "the page scrolls sideways"
        assert seen["smallest"] >= 12, "lines of letters too small to read"
        assert (seen["before"][:6], seen["after"][:6]) == ("Step 1", "Step 2")
        assert "(target 3 %): rejected" in seen["why"]
    assert found["desk"]["paper"] == "rgb(255, 255, 255)" != found["phone"]["paper"]
