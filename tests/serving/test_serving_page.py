"""The chat page in a headless Chromium, under its real policy and against a stub; and the drawing of one step."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest

pytest.importorskip("playwright", reason="the browser's driver comes with haast[dev]")

from page_server import HOSTILE, MODEL, POLICY, SHARED, SKY, Json, Stub, answer, serving, step_document
from pages import NASTY, trace_document
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from haast.bench.page import trace_html
from haast.serving.step_view import MOST_DEPTH, MOST_NODES, step_html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browsing = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
TEXT = SKY.replace("\n", "").replace("|", "")
STATIC = files("haast.serving") / "static"


class Chat:
    """A page that is open, and all that it complained of."""

    def __init__(self, page: Page, stub: Stub, url: str) -> None:
        self.page, self.stub, self.url = page, stub, url
        self.complaints: list[str] = []
        self.refusals: list[int] = []  # statuses that the test means to come, which Chromium logs by itself
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.set_default_timeout(15_000)

    def _heard(self, message: ConsoleMessage) -> None:
        status = re.fullmatch(r"Failed to load resource: .* status of (\d+) .*", message.text)
        if message.type in ("error", "warning") and not (status and int(status[1]) in self.refusals):
            self.complaints.append(message.text)

    def open(self, ready: bool = True) -> Chat:
        self.page.goto(self.url)
        if ready:
            expect(self.page.locator("#drafter")).to_have_text("eagle+suffix")
        return self

    def say(self, text: str) -> None:
        self.page.locator("#prompt").fill(text)
        self.page.keyboard.press("Enter")

    def ask(self, text: str) -> None:
        """Ask, and wait for the answer's end."""
        self.say(text)
        expect(self.page.locator(".turn.model").last.locator(".actions button").first).to_be_visible()
        expect(self.page.locator("#send")).to_be_visible()

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).last.text_content())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Stub, str]]:
    stub = Stub()
    with serving(stub) as url:
        yield stub, url


expect.set_options(timeout=15_000)  # other tests may keep the machine busy
Opens = Callable[..., Any]


@pytest.fixture
def chats(browser: Browser, served: tuple[Stub, str]) -> Iterator[Opens]:
    """Opens pages; at the end none may have complained, nor run what it was only to show."""
    stub, url = served
    stub.asked.clear()
    stub.key, stub.loading, stub.unfinished = None, 0, 0

    @contextmanager
    def opened(ready: bool = True, **how: Any) -> Iterator[Chat]:
        how = {"viewport": {"width": 1280, "height": 860}, **how}
        context = browser.new_context(**how)
        chat = Chat(context.new_page(), stub, url)
        chat.page.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error('policy: ' + e.violatedDirective))"
        )
        yield chat.open(ready) if ready else chat
        assert chat.page.title() == "Haast", "a text was run"
        context.close()
        assert chat.complaints == []

    yield opened


@pytest.fixture
def chat(chats: Opens) -> Iterator[Chat]:
    with chats() as chat:
        yield chat


@browsing
def test_an_answer_streams_with_every_token_marked(chat: Chat) -> None:
    chat.ask("Why is the sky blue?")
    assert chat.text(".turn.model .answer:not(.thoughts)") == TEXT
    tokens = [token for group in answer(SKY) for token in group]
    assert chat.page.locator(".token").all_text_contents() == tokens
    drafted = [token.lstrip() for group in answer(SKY)[1:] for token in group[:-1]]
    assert chat.page.locator(".token .yes").all_text_contents() == drafted
    lines = "(each) => getComputedStyle(each).textDecorationLine"
    assert chat.page.locator(".token .yes").first.evaluate(lines) == "underline", "told apart without colours too"
    assert chat.page.locator(".token .own").first.evaluate(lines) == "none"
    legend = chat.page.locator(".marks")
    assert (
        legend.is_visible()
        and "accepted draft" in chat.text(".marks")
        and "the target\u2019s own" in chat.text(".marks")
    )
    (body,) = chat.stub.asked
    assert body["messages"] == [{"role": "user", "content": "Why is the sky blue?"}] and body["model"] == MODEL
    assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["haast"] == {"trace": True}
    assert body["temperature"] == 0.7 and body["max_tokens"] == 512 and isinstance(body["seed"], int)


@browsing
def test_the_numbers_come_with_the_text_and_the_servers_at_the_end(chat: Chat) -> None:
    page = chat.page
    chat.say("slow")
    expect(page.locator(".meter .tau dd")).to_have_text(re.compile(r"^[2-4]\.\d\d$"))
    expect(page.locator(".meter .speed dd")).to_have_text(re.compile(r"^\d+\.\d$"))
    assert page.locator("#stop").is_visible(), "still running"
    assert "draft" in chat.text(".parts") and "prefill" not in chat.text(".parts")
    page.keyboard.press("Escape")
    chat.ask("sky")
    last = page.locator(".turn.model").last
    steps = answer(SKY)[1:]
    tau = sum(map(len, steps)) / len(steps)
    expect(last.locator(".tau dd")).to_have_text(f"{tau:.2f}")
    assert last.locator(".vanilla dd").text_content() == "31.2"
    speed = float(last.locator(".speed dd").text_content() or 0)
    assert last.locator(".times dd").text_content() in {f"{(speed + far) / 31.2:.2f}\u00d7" for far in (-0.04, 0, 0.04)}
    found = re.findall(r"(prefill|draft|verify|rest) (\d+) ms", chat.text(".parts"))
    assert [name for name, _ in found] == ["prefill", "draft", "verify", "rest"] and ("prefill", "118") in found
    assert f"seed {chat.stub.asked[-1]['seed']}" in chat.text(".parts")


@browsing
def test_a_tokens_tree_shows_what_the_target_thought(chat: Chat) -> None:
    chat.ask("sky")
    page, groups = chat.page, answer(SKY)
    number = next(at for at, group in enumerate(groups[1:]) if " rainbow" in group)
    page.locator(".token", has_text="rainbow").click()
    step = step_document(number, 50, groups[number][-1], groups[number + 1])
    drawn = re.findall(r'class="node (\w+)[^>]*>([^<]*)', step_html(step))
    nodes = page.locator("#inspector .node")
    expect(nodes).to_have_count(len(drawn))
    assert [str(node).split()[1] for node in nodes.evaluate_all("(all) => all.map((one) => one.className)")] == [
        fate for fate, _ in drawn
    ]
    assert {"root", "accepted", "rejected", "own"} <= {fate for fate, _ in drawn}
    chances = page.locator("#inspector .node small").all_text_contents()
    assert len(chances) == len(drawn) - 1 and all(re.fullmatch(r"<?>?[\d.]+ %", chance) for chance in chances)
    expect(page.locator(".picked")).to_have_text(re.compile("rainbow"))
    expect(page.locator(".why")).to_have_text(re.compile("drafted “·rainbow” .*accepted, the target chose it too"))
    page.locator(".node.rejected").first.hover()
    expect(page.locator(".why")).to_have_text(re.compile("rejected, the target chose “.*” \\(\\d+ %\\)"))
    assert page.locator(".run[aria-current]").text_content() == "".join(groups[number + 1])

    page.get_by_role("button", name="Next step").click()
    expect(page.locator("#inspector .title")).to_have_text(re.compile(f"^Step {number + 2} "))
    assert page.locator(".run[aria-current]").text_content() == "".join(groups[number + 2])
    page.locator(".token").first.click()
    expect(page.locator(".why")).to_have_text(re.compile("prefill of the prompt"))
    page.get_by_role("button", name="Close the tree").click()
    assert page.locator("#inspector").is_hidden() and page.locator(".run[aria-current]").count() == 0


@browsing
def test_a_token_can_be_picked_while_the_answer_comes(chat: Chat) -> None:
    chat.say("slow")
    chat.page.locator(".token").nth(4).click()
    expect(chat.page.locator("#inspector .title")).to_have_text(re.compile("^Step"))
    before = chat.page.locator(".token").count()
    expect(chat.page.locator(f".token >> nth={before + 5}")).to_be_attached()
    assert chat.page.locator(".token").nth(4).evaluate("(one) => one === document.activeElement"), "it kept the focus"
    chat.page.keyboard.press("Escape")
    expect(chat.page.locator("#send")).to_be_visible()
    assert chat.page.locator("#inspector").is_visible(), "Escape stops first, and closes after that"
    chat.page.keyboard.press("Escape")
    assert chat.page.locator("#inspector").is_hidden()


@browsing
def test_all_goes_by_keyboard(chat: Chat) -> None:
    page, press = chat.page, chat.page.keyboard.press
    here = "document.activeElement.textContent"
    page.keyboard.type("Two")
    press("Shift+Enter")
    page.keyboard.type("lines")
    press("Enter")
    expect(page.locator(".steps")).to_be_visible()
    assert chat.stub.asked[0]["messages"][-1]["content"] == "Two\nlines"
    assert page.evaluate("document.activeElement.id") == "prompt"
    for _ in range(8):
        press("Shift+Tab")
        if page.evaluate("document.activeElement.matches('.token')"):
            break
    assert page.evaluate(here) == "The" and page.evaluate("document.activeElement.getAttribute('role')") == "button"
    press("ArrowRight")
    press("ArrowRight")
    assert page.evaluate(here) == " is"
    label = "document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(label) == "is, accepted draft, step 1"
    assert page.locator(".token[role=button]").count() == 1, "the Tab key stops once in an answer"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    press("Enter")
    expect(page.locator(".picked")).to_have_text(re.compile("·is"))
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    press("ArrowDown")  # the next step's first token: the open panel follows
    expect(page.locator("#inspector .title")).to_have_text(re.compile("^Step 2 "))
    press("End")
    expect(page.locator("#inspector .title")).to_have_text(re.compile(f"^Step {len(answer(SKY)) - 1} "))
    press("Home")
    press("ArrowDown")
    expect(page.locator(".picked")).to_have_text(re.compile("·sky"))
    for _ in range(8):
        press("Tab")
        if page.evaluate("document.activeElement.matches('.node')"):
            break
    press("ArrowRight")
    assert "sky" in page.evaluate(here)
    press("ArrowDown")
    expect(page.locator(".why")).to_have_text(re.compile("rejected"))
    press("Escape")
    assert page.locator("#inspector").is_hidden() and page.evaluate(here) == " sky", "the focus went back"


@browsing
def test_without_drafting_the_text_is_the_same(chat: Chat) -> None:
    chat.ask("sky")
    page = chat.page
    page.get_by_role("button", name="Same seed without drafting").click()
    expect(page.locator(".verdict")).to_contain_text("Same text")
    size = f"{len(TEXT)} characters, {sum(map(len, answer(SKY)))} tokens"
    assert size in chat.text(".verdict")
    drafted, plain = chat.stub.asked
    assert plain == drafted | {"haast": {"trace": True, "drafter": "none"}}, (
        "the very same conversation, seed and settings"
    )
    expect(page.locator(".vanilla dd")).to_have_text("31.0")  # what was measured, instead of what is usual
    assert "31.0 tokens/s" in chat.text(".speeds") and "times as fast" in chat.text(".gain")


@browsing
def test_another_text_without_drafting_is_told(chat: Chat) -> None:
    chat.ask("different")
    chat.page.get_by_role("button", name="Same seed without drafting").click()
    place = TEXT.index("dusk") + 2
    expect(chat.page.locator(".verdict")).to_have_text(f"✗ Different text without drafting, from character {place} on.")
    assert [text[:3] for text in chat.page.locator(".parting mark").all_text_contents()] == ["usk", "awn"]


@browsing
def test_a_stopped_answer_is_compared_as_far_as_it_goes(chat: Chat) -> None:
    chat.say("slow")
    expect(chat.page.locator(".token >> nth=20")).to_be_attached()
    chat.page.get_by_role("button", name="Stop").click()
    expect(chat.page.locator(".status")).to_have_text("Stopped.")
    chat.page.get_by_role("button", name="Same seed without drafting").click()
    expect(chat.page.locator(".verdict")).to_contain_text(
        "Same text with and without drafting, as far as the answer goes"
    )
    expect(chat.page.locator("#send")).to_be_visible()


@browsing
def test_marks_can_be_put_away(chat: Chat) -> None:
    chat.ask("sky")
    lines = "(each) => getComputedStyle(each).textDecorationLine"
    chat.page.get_by_label("Marks").uncheck()
    assert chat.page.locator(".token .yes").first.evaluate(lines) == "none"


@browsing
def test_where_texts_part(chat: Chat) -> None:
    pairs = [("", ""), ("ab", "ab"), ("ab", "abc"), ("abc", "ab"), ("\U0001f305", "\U0001f306"), ("a", "b")]
    script = (
        "async (pairs) => pairs.map("
        "((module) => (pair) => module.firstDifference(...pair))(await import('./static/check.js')))"
    )
    assert chat.page.evaluate(script, pairs) == [-1, -1, 2, 2, 0, 0]


@browsing
@pytest.mark.parametrize("width", [360, 768])
def test_no_width_scrolls_sideways(chats: Opens, width: int) -> None:
    with chats(viewport={"width": width, "height": 780}, color_scheme="dark", has_touch=width < 500) as chat:
        page = chat.page
        sideways = "document.documentElement.scrollWidth - innerWidth"
        assert page.evaluate(sideways) <= 0
        chat.ask("html " + "wide" * 100)
        chat.ask("sky")
        page.locator(".token", has_text="rainbow").last.click()
        expect(page.locator(".tree")).to_be_visible()
        chat.page.locator(".without").last.click()
        expect(page.locator(".speeds")).to_be_visible()
        assert page.evaluate(sideways) <= 0
        assert (
            page.evaluate("document.querySelector('#talk').scrollWidth - document.querySelector('#talk').clientWidth")
            <= 0
        )
        page.get_by_role("button", name="Settings", exact=True).click()
        assert page.evaluate(sideways) <= 0
        assert page.locator("#settings").evaluate("(one) => one.getBoundingClientRect().right <= innerWidth")


_CONTRAST = """() => {
  const channel = (v) => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; };
  const light = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = numbers(getComputedStyle(one).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement, style = getComputedStyle(one);
    if (!walker.currentNode.data.trim() || !one.checkVisibility()) continue;
    if (one.closest('[aria-disabled="true"], .unseen')) continue;
    const [a, b] = [light(numbers(style.color)), light(behind(one))].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), one.outerHTML.slice(0, 90)]);
  }
  return found;
}"""


@browsing
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(chats: Opens, scheme: str) -> None:
    with chats(color_scheme=scheme) as chat:
        page = chat.page
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
        chat.refusals = [400]
        seen = page.evaluate(_CONTRAST)
        chat.say("refuse")
        expect(page.locator(".trouble")).to_be_visible()
        seen += page.evaluate(_CONTRAST)
        chat.ask("different")
        page.locator(".without").click()
        expect(page.locator(".speeds")).to_be_visible()
        page.locator(".steps").click()
        expect(page.locator(".tree")).to_be_visible()
        page.locator("#settings-button").click()
        seen += page.evaluate(_CONTRAST)
        assert len(seen) > 100 and [each for each in seen if each[0] < 4.5] == []


@browsing
def test_the_theme_is_the_readers_choice_and_stays(chat: Chat) -> None:
    page = chat.page
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.get_by_role("button", name="Switch to dark colours").click()
    assert page.evaluate(paper) != light
    chat.open()
    assert page.evaluate(paper) != light
    page.get_by_role("button", name="Switch to light colours").click()
    assert page.evaluate(paper) == light


@browsing
def test_nothing_moves_for_who_wants_that(chats: Opens) -> None:
    dot = "getComputedStyle(document.querySelector('.waiting'), '::before').animationName"
    for wish, name in (("reduce", "none"), ("no-preference", "breathe")):
        with chats(reduced_motion=wish) as chat:
            chat.say("slow")
            expect(chat.page.locator(".token").first).to_be_attached()
            assert chat.page.evaluate(dot) == name
            chat.page.keyboard.press("Escape")


@browsing
def test_all_that_is_said_stays_text(chat: Chat) -> None:
    page = chat.page
    chat.refusals = [400]
    chat.ask(f"html {HOSTILE}")
    assert HOSTILE in chat.text(".turn.you") and HOSTILE in chat.text(".turn.model .answer:not(.thoughts)")
    page.locator(".token", has_text="onerror").click()
    expect(page.locator(".tree")).to_contain_text("<img·src=x")
    page.locator(".without").click()
    expect(page.locator(".verdict")).to_contain_text("Same text")
    chat.ask("tool")
    assert chat.text(".call") == f'Calls the tool {HOSTILE} with {{"a": 1}}'
    chat.ask("reason")
    page.locator("summary:visible").click()
    assert chat.text(".thoughts") == "The user asks about <the> sky."
    chat.say("refuse")
    expect(page.locator(".trouble").last).to_be_visible()
    assert HOSTILE in chat.text(".trouble") and "temperature" in chat.text(".trouble")
    chat.say("broken")
    expect(page.locator(".trouble").last).to_contain_text("The server failed: </span><img")
    assert chat.text(".turn.model .answer:not(.thoughts)") == "The sky is blue because", "what had come is kept"
    assert page.locator(":is(.turn, #inspector) :is(img, script, h1)").count() == 0
    assert "The user asks" not in json.dumps(chat.stub.asked[-1]["messages"]), "reasoning is not said again"


@browsing
def test_text_that_comes_later_than_its_token_is_marked_all_the_same(chat: Chat) -> None:
    chat.ask("odd")
    assert (
        chat.text(".thoughts") == "hm <x>"
        and chat.text(".turn.model .answer:not(.thoughts)") == "no token. é<bThe sky is blue"
    )
    assert chat.page.locator(".token").all_text_contents()[:4] == ["hm", " <x>", "é", "<b"]
    assert chat.page.locator(".token .yes").all_text_contents()[:2] == ["hm", "<x>"]
    chat.page.locator(".token", has_text="<b").click()
    expect(chat.page.locator(".why")).to_have_text("The server sent no tree for this step.")


@browsing
def test_the_key_is_asked_for_and_kept_for_the_tab(chats: Opens) -> None:
    with chats(ready=False) as chat:
        page, dialog = chat.page, chat.page.get_by_role("dialog", name="API key")
        chat.refusals, chat.stub.key = [401], "sesame"
        chat.open(ready=False)
        expect(dialog).to_be_visible()
        field = page.get_by_label("Key", exact=True)
        assert field.get_attribute("type") == "password"
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
        expect(page.locator("#model-name")).to_contain_text("needs a key, and none was entered")
        chat.say("sky")
        field.fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-words")).to_contain_text("rejects this key")
        field.fill("sesame")
        page.keyboard.press("Enter")
        expect(page.locator(".steps")).to_be_visible()
        assert page.evaluate("[sessionStorage.getItem('haast-key'), JSON.stringify(localStorage)]") == ["sesame", "{}"]
        page.locator(".token").last.click()
        expect(page.locator(".tree")).to_be_visible()
        chat.open()
        assert not dialog.is_visible(), "the tab still knows it"


@browsing
def test_a_loading_model_is_waited_for(chats: Opens) -> None:
    with chats(ready=False) as chat:
        chat.refusals, chat.stub.loading = [503], 10**6
        chat.open(ready=False)
        expect(chat.page.locator("#model-name")).to_contain_text("The model is loading. Retrying in")
        chat.say("sky")
        expect(chat.page.locator(".status")).to_contain_text("The model is loading")
        chat.page.keyboard.press("Escape")
        expect(chat.page.locator(".status")).to_have_text("Stopped.")
        chat.say("sky")
        chat.stub.loading = 1
        expect(chat.page.locator(".steps")).to_be_visible()
        assert chat.text("#model-name") == MODEL


@browsing
def test_errors_are_told_in_words_and_may_be_tried_again(chat: Chat) -> None:
    page = chat.page
    chat.refusals = [429]
    chat.ask("sky")
    chat.say("busy")
    expect(page.get_by_role("alert")).to_have_text("The server is busy: too many requests wait. Try again in 7 s.")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_be_visible()
    assert len(chat.stub.asked) == 3 and chat.stub.asked[1]["messages"] == chat.stub.asked[2]["messages"]
    chat.say("cut")
    expect(page.get_by_role("alert").last).to_contain_text("The connection was lost")
    said = [each["content"] for each in chat.stub.asked[-1]["messages"]]
    assert said == ["sky", TEXT, "cut"], "a question without an answer is not said again"
    page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    chat.say("sky")
    expect(page.get_by_role("alert").last).to_contain_text("The server can\u2019t be reached")
    chat.complaints = [each for each in chat.complaints if "ERR_CONNECTION_REFUSED" not in each]


@browsing
def test_stop_ends_it_for_the_server_too(chat: Chat) -> None:
    chat.say("slow")
    expect(chat.page.locator(".token >> nth=5")).to_be_attached()
    chat.page.keyboard.press("Escape")
    expect(chat.page.locator(".status")).to_have_text("Stopped.")
    assert chat.page.evaluate("document.activeElement.id") == "prompt"
    for _ in range(100):
        if chat.stub.unfinished:
            break
        chat.page.wait_for_timeout(20)
    assert chat.stub.unfinished == 1
    partial = chat.text(".turn.model .answer:not(.thoughts)")
    chat.ask("sky")
    assert [each["content"] for each in chat.stub.asked[-1]["messages"]] == ["slow", partial, "sky"]


@browsing
def test_regenerate_asks_again_and_clear_forgets(chat: Chat) -> None:
    page = chat.page
    chat.ask("sky")
    chat.ask("Why?")
    assert page.get_by_role("button", name="Regenerate").count() == 1, "only the last answer can be another"
    page.locator(".steps").last.click()
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".steps")).to_have_count(2)
    second, third = chat.stub.asked[1:]
    assert second["messages"] == third["messages"] and second["seed"] != third["seed"]
    assert page.locator(".turn").count() == 4 and page.locator("#inspector").is_hidden()
    chat.say("slow")
    page.get_by_role("button", name="Clear").click()
    assert page.locator(".turn").count() == 0 and page.locator("#welcome").is_visible()
    page.get_by_role("button", name="Why is the sky blue?").click()
    expect(page.locator(".steps")).to_be_visible()
    assert len(chat.stub.asked[-1]["messages"]) == 1


@browsing
def test_settings_are_sent_as_they_are_filled_in(chat: Chat) -> None:
    page = chat.page
    page.get_by_role("button", name="Settings", exact=True).click()
    told = {
        "Temperature": ("temperature", "0"), "Top p": ("top_p", "0.9"), "Top k": ("top_k", "40"),
        "Min p": ("min_p", "0.05"), "Seed": ("seed", "7"), "Max tokens": ("max_tokens", "64"),
        "Repetition": ("repetition_penalty", "1.1"), "Presence": ("presence_penalty", "-0.5"),
        "Frequency": ("frequency_penalty", "0.25"),
    }  # fmt: skip
    for label, (_, value) in told.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("System prompt").fill("Be brief.")
    chat.ask("sky")
    (body,) = chat.stub.asked
    assert {name: body[name] for name, _ in told.values()} == {name: float(value) for name, value in told.values()}
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page.get_by_role("button", name="Close the settings").click()
    page.locator("#top_p").evaluate("(field) => { field.value = '7'; }")
    chat.say("sky")
    expect(page.locator("#top_p")).to_be_focused()
    assert page.locator("#prompt").input_value() == "sky" and len(chat.stub.asked) == 1, "it was not sent"
    page.get_by_role("button", name="Reset").click()
    page.get_by_label("Temperature").fill("")
    chat.ask("sky")
    assert not {"temperature", "top_p", "top_k"} & set(chat.stub.asked[-1])
    page.keyboard.press("Escape")
    assert page.locator("#settings").is_hidden()


@browsing
def test_what_a_screen_reader_finds(chat: Chat) -> None:
    page = chat.page
    chat.ask("sky")
    for role, name in (("main", "Conversation"), ("banner", ""), ("form", "Message"), ("textbox", "Message")):
        assert page.get_by_role(role, name=name).count() == 1, role  # type: ignore[arg-type]
    log = page.get_by_role("log", name="Announcements")
    assert log.get_attribute("aria-live") == "polite"
    said = [str(each) for each in page.locator("#spoken p").all_text_contents()]
    assert "".join(said[:-1]) == TEXT and said[-1] == f"{sum(map(len, answer(SKY)))} tokens."
    assert 3 <= len(said) < 10, "by sentences, not by tokens"
    assert page.evaluate(
        "[...document.querySelectorAll('button')].every((one) => one.textContent.trim() || one.ariaLabel)"
    )
    page.locator(".steps").click()
    expect(page.get_by_role("region", name="A step\u2019s tree")).to_be_visible()
    page.locator("#settings-button").click()
    expect(page.get_by_role("complementary", name="Settings")).to_be_visible()
    named = "(all) => all.every((one) => one.labels.length || one.ariaLabel)"
    assert page.locator("input, textarea, select").evaluate_all(named)


@browsing
def test_all_that_the_page_asks_for_is_there(chats: Opens) -> None:
    with chats(ready=False) as chat:
        replies: list[tuple[str, int]] = []
        chat.page.on("response", lambda reply: replies.append((reply.url, reply.status)))
        chat.open()
        chat.page.wait_for_load_state("networkidle")
        assert {status for _, status in replies} == {200}
        assert all(url.startswith(chat.url) for url, _ in replies), "from nowhere else"
        assert chat.page.request.get(f"{chat.url}static/icon.svg").ok
        assert chat.page.request.get(chat.url).headers["content-security-policy"] == POLICY


def test_no_text_is_parsed_and_nothing_is_inline() -> None:
    scripts = {each.name: each.read_text(encoding="utf-8") for each in STATIC.iterdir() if each.name.endswith(".js")}
    scripts["page.js"] = (files("haast.bench") / "templates" / "page.js").read_text(encoding="utf-8")
    for name, script in scripts.items():
        assert not re.search(
            r"(inner|outer)HTML|insertAdjacentHTML|document\.write|setHTML|\beval\(|new Function", script
        ), name
        assert not re.search(r"https?://", script), name
        assert name == "inspector.js" or "DOMParser" not in script, "one place parses, and only the server's drawing"
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|https?://", page)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", page))
    wanted = re.findall(r'(?:src|href)="static/([^"]+)"', page)
    wanted += re.findall(r'from "\./([^"]+)"', "".join(scripts.values()))
    templates = files("haast.bench") / "templates"
    assert {name for name in wanted if not (STATIC / name).is_file()} == set(SHARED)
    assert all((templates / name).is_file() for name in SHARED)


# The drawing of one step.


def sky_step() -> Json:
    return step_document(3, 50, " blue", [" of", " <b>a</b>", " phenomenon"])


def test_a_step_is_drawn_as_the_report_draws_it() -> None:
    document = trace_document()
    for number, step in enumerate(document["steps"]):
        tree = re.search(r'<ul class="tree"[^>]*>(.*)</ul></div>', step_html(step | {"number": number}))
        assert tree and tree[1] in trace_html(document)
    assert '<h2 class="title">Step 4 <span>2 of' in step_html(sky_step())
    assert '<h2 class="title">Step <span>' in step_html(
        {key: each for key, each in sky_step().items() if key != "number"}
    )


class Tags(HTMLParser):
    """Which elements and attributes a fragment has."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = set[str](), set[str](), ""
        self.feed(fragment)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "text", [HOSTILE[:24], NASTY[:24], "\ud800", "\u202e", '" onmouseover="alert(1)', "{{ 7 * 7 }}", "\x00", ""]
)
def test_hostile_tokens_stay_text(text: str) -> None:
    step = sky_step()
    for node in step["nodes"]:
        node["text"] = text
        if node["choice"]:
            node["choice"]["text"] = text
    fragment = step_html(step)
    fragment.encode()
    found = Tags(fragment)
    assert found.tags == {"section", "h2", "span", "div", "ul", "li", "small", "p"}
    assert found.attributes == {"class", "id", "tabindex", "title", "aria-label", "aria-live"}, "no style, no handlers"
    assert "49" not in found.text.replace("49 %", "")


def broken(change: Callable[[Json], Any]) -> Json:
    step = copy.deepcopy(sky_step())
    change(step)
    return step


def chain(depth: int) -> Json:
    step = sky_step()
    one = step["nodes"][1] | {"choice": None, "accepted": False}
    step["nodes"] = step["nodes"][:1] + [one | {"id": at, "parent": at - 1, "depth": at} for at in range(1, depth + 1)]
    return step


def wide(nodes: int) -> Json:
    step = sky_step()
    step["nodes"] = step["nodes"][:1] + [step["nodes"][1] | {"id": at} for at in range(1, nodes)]
    return step


BROKEN: dict[str, Any] = {
    "no object": [], "nothing": {}, "text": "step", "none": None,
    "no nodes": broken(lambda step: step.pop("nodes")),
    "empty": broken(lambda step: step["nodes"].clear()),
    "nodes no list": broken(lambda step: step.update(nodes={"0": {}})),
    "node no object": broken(lambda step: step["nodes"].append(3)),
    "no root": broken(lambda step: step["nodes"].pop(0)),
    "dead root": broken(lambda step: step["nodes"][0].update(live=False)),
    "id twice": broken(lambda step: step["nodes"][2].update(id=1)),
    "id no number": broken(lambda step: step["nodes"][1].update(id="1")),
    "id true": broken(lambda step: step["nodes"][1].update(id=True)),
    "id list": broken(lambda step: step["nodes"][1].update(id=[1])),
    "no parent": broken(lambda step: step["nodes"][1].update(parent=77)),
    "own parent": broken(lambda step: step["nodes"][1].update(parent=1)),
    "circle": broken(lambda step: (step["nodes"][1].update(parent=2), step["nodes"][2].update(parent=1))),
    "wrong depth": broken(lambda step: step["nodes"][1].update(depth=4)),
    "text missing": broken(lambda step: step["nodes"][1].pop("text")),
    "text a number": broken(lambda step: step["nodes"][1].update(text=3)),
    "text endless": broken(lambda step: step["nodes"][1].update(text="a" * 5000)),
    "probability 2": broken(lambda step: step["nodes"][1].update(target_prob=2)),
    "probability nan": broken(lambda step: step["nodes"][1].update(target_prob=float("nan"))),
    "probability text": broken(lambda step: step["nodes"][1].update(target_prob="<b>")),
    "choice text": broken(lambda step: step["nodes"][0].update(choice="x")),
    "choice without prob": broken(lambda step: step["nodes"][0]["choice"].pop("prob")),
    "flag a number": broken(lambda step: step["nodes"][0].update(live=1)),
    "ms missing": broken(lambda step: step.pop("ms_draft")),
    "ms endless": broken(lambda step: step.update(ms_draft=float("inf"))),
    "ms negative": broken(lambda step: step.update(ms_verify=-1)),
    "ms text": broken(lambda step: step.update(ms_verify="<b>")),
    "emitted missing": broken(lambda step: step.pop("emitted")),
    "emitted flag": broken(lambda step: step["emitted"][0].update(drafted="no")),
    "emitted endless": broken(lambda step: step.update(emitted=step["emitted"][:1] * 10_000)),
    "own token from nowhere": broken(lambda step: [node.update(choice=None) for node in step["nodes"]]),
    "number text": broken(lambda step: step.update(number="<b>")),
    "number huge": broken(lambda step: step.update(number=10**400)),
    "too many nodes": wide(MOST_NODES + 1), "too deep": chain(MOST_DEPTH + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_step_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"\w+ "):
        step_html(BROKEN[name])


@pytest.mark.parametrize("step", [wide(MOST_NODES), chain(MOST_DEPTH), sky_step() | {"emitted": []}])
def test_the_largest_steps_are_drawn(step: Json) -> None:
    fragment = step_html(step)
    assert fragment.count('class="node ') >= sum(node["live"] for node in step["nodes"])
