"""Checks of sampling fields: each has its effect, or is refused by name; none is ignored.

The model's text is not known, so each field is tested by a property: top_k=1 at a high temperature is greedy, a bias of
100 leaves one token, penalties reduce repetition, and a seed gives the same text again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from haast.serving.conform.answers import Answer, repeats
from haast.serving.conform.base import Check, Theme, demand, fail, not_visible, short, silent
from haast.serving.conform.client import Reply
from haast.serving.conform.subject import CHAT, COUNT, STORY, Subject, complaint, named, same_text

_HOT = 1.5
_SEEDS = (1, 2, 3, 4)
_BIASED = range(1000, 1006)  # ids that every vocabulary has; any token will do
_LOOPS = (COUNT, STORY, "Repeat the word 'la' thirty times.")


def greedy_steady(subject: Subject) -> str:
    """Temperature 0, three times."""
    texts = [subject.ask("Describe a lake at dawn.", max_tokens=24).text for _ in range(3)]
    for text in texts[1:]:
        same_text(texts[0], text, "the same greedy request again")
    return "the same text three times"


def temperature(subject: Subject) -> str:
    """A high temperature: the text is sampled, not greedy."""
    greedy = subject.ask(STORY, max_tokens=12).text
    texts = [subject.ask(STORY, max_tokens=12, temperature=_HOT).text for _ in range(4)]
    if set(texts) == {greedy}:
        silent(f"temperature={_HOT} gives the greedy text four times: {short(greedy, 40)}")
    return f"{len(set(texts))} different texts of 4 at temperature {_HOT}"


def tiny_temperature(subject: Subject) -> str:
    """Extreme values of temperature and top_k."""
    greedy = subject.ask(COUNT, max_tokens=12).text
    for fields in ({"temperature": 1e-6}, {"temperature": 1, "top_k": 10_000_000}):
        reply = subject.client.post(CHAT, subject.body(COUNT, **{"max_tokens": 12, **fields}))
        demand(reply.status < 500, f"HTTP {reply.status} for {fields}: {short(reply.text, 100)}")
        if reply.status != 200:
            _names_one(reply, fields)
        elif "top_k" not in fields:
            same_text(greedy, reply.body["choices"][0]["message"].get("content") or "", "temperature=1e-6")
    return "1e-6 is greedy, and a top_k above the vocabulary size is accepted"


def _names_one(reply: Reply, fields: dict[str, Any]) -> None:
    message = complaint(reply)
    demand(any(named(name, message) for name in fields), f"HTTP {reply.status} for {fields}: {short(message, 100)}")


def seed(subject: Subject) -> str:
    """The same seed twice, and other seeds."""
    texts = [subject.ask(STORY, temperature=1, seed=each, max_tokens=16).text for each in _SEEDS]
    again = [subject.ask(STORY, temperature=1, seed=each, max_tokens=16).text for each in _SEEDS]
    if len(set(texts)) == 1:
        if texts[0] == subject.ask(STORY, max_tokens=16).text:
            not_visible("every text is the greedy one: see the check temperature")
        silent(f"seeds {_SEEDS} all give {short(texts[0])} at temperature 1")
    if all(one != two for one, two in zip(texts, again, strict=True)):
        silent(f"seed={_SEEDS[0]} gives {short(texts[0], 40)} and then {short(again[0], 40)}")
    for number, one, two in zip(_SEEDS, texts, again, strict=True):
        same_text(one, two, f"seed={number} again")
    return f"{len(_SEEDS)} seeds, each gives its text again, {len(set(texts))} different texts"


def seed_busy(subject: Subject) -> str:
    """Seeds while other requests run."""
    subject.needs_seed()
    numbers = range(21, 29)

    def request(number: int) -> Callable[[], str]:
        return lambda: subject.ask(STORY, temperature=1, seed=number, max_tokens=6 + number % 7).text

    alone = [request(number)() for number in numbers]
    together = subject.at_once([request(number) for number in numbers])
    for number, one, two in zip(numbers, alone, together, strict=True):
        same_text(one, two, f"seed={number} while seven others run")
    return "eight at once, each has the text that it has alone"


def choices(subject: Subject) -> str:
    """Several choices (n)."""
    fields = {"n": 3, "temperature": 1, "max_tokens": 16}
    if subject.seeded():
        fields["seed"] = 9
    answer = subject.ask(STORY, **fields)
    if len(answer.choices) == 1:
        silent("n=3 gives one choice")
    demand(sorted(answer.choices) == [0, 1, 2], f"n=3 gives the indices {sorted(answer.choices)}")
    texts = _texts(answer)
    demand(len(set(texts)) == 3, f"two of three choices at temperature 1 are the same: {short(texts[0])}")
    if not subject.seeded():
        return "three different texts; repeatability needs a seed"
    demand(_texts(subject.ask(STORY, **fields)) == texts, "the same seed gives other choices")
    streamed = subject.streamed(STORY, **fields)
    demand(_texts(streamed) == texts, f"in a stream the choices {sorted(streamed.choices)} have other texts")
    return "three different texts, the same when repeated and in a stream"


def _texts(answer: Answer) -> list[str]:
    return [answer.choices[index].text for index in sorted(answer.choices)]


def _narrowing(field: str, value: float) -> Callable[[Subject], str]:
    """Check of a field that leaves only the likeliest token: the text is greedy at any temperature."""

    def check(subject: Subject) -> str:
        greedy = subject.ask(STORY, max_tokens=14).text
        wide = [subject.ask(STORY, max_tokens=14, temperature=_HOT).text for _ in range(2)]
        texts = [subject.ask(STORY, max_tokens=14, temperature=_HOT, **{field: value}).text for _ in range(2)]
        if set(wide) == {greedy}:
            not_visible(f"the text at temperature {_HOT} is greedy without {field} too")
        if greedy not in texts:
            silent(f"{field}={value} at temperature {_HOT} gives {short(texts[0], 40)}, not the greedy text")
        for text in texts:
            same_text(greedy, text, f"{field}={value} at temperature {_HOT}")
        return f"{field}={value} at temperature {_HOT} is greedy"

    return check


def _penalty(field: str, value: float) -> Callable[[Subject], str]:
    """Check of a field that reduces repetition; how much depends on the model."""

    def check(subject: Subject) -> str:
        before = [subject.once(f"loop {each}", lambda each=each: subject.ask(each, max_tokens=32)) for each in _LOOPS]  # type: ignore[misc]
        after = [subject.ask(each, max_tokens=32, **{field: value}) for each in _LOOPS]
        plain, penalised = [each.text for each in before], [each.text for each in after]
        if plain == penalised:
            silent(f"{field}={value} changes none of {len(plain)} texts of 32 tokens")
        count_after, count_before = repeats(penalised), repeats(plain)
        counts = f"{count_before} repeated words become {count_after}"
        demand(count_after <= count_before, f"{field}={value}: {counts}")
        return counts

    return check


def logit_bias(subject: Subject) -> str:
    """A bias of 100 and of -100."""
    greedy = subject.ask(STORY, max_tokens=6).text
    for token in _BIASED:
        fields = {"logit_bias": {str(token): 100}}
        one = subject.ask(STORY, max_tokens=1, **fields).text.strip()
        if one and "\ufffd" not in one:
            break
    else:
        not_visible(f"the tokens {_BIASED[0]} to {_BIASED[-1]} have no text")
    six = subject.ask(STORY, max_tokens=6, **fields).text
    if six == greedy:
        silent(f"a bias of 100 on token {token} leaves {short(greedy)}")
    rest = six.replace(one, "").strip()
    demand(not rest and six.count(one) == 6, f"a bias of 100 on one token gives {short(six)}, not {short(one)} 6 times")
    return f"100 leaves one token; {_banned(subject)}"


def _banned(subject: Subject) -> str:
    """-100 bans a token, if its id can be found out."""
    first = subject.ask(STORY, max_tokens=1).text
    ids = _ids(subject, first)
    if not ids or not first.strip():
        return "-100 was not tested: token ids are unknown"
    other = subject.ask(STORY, max_tokens=1, logit_bias={str(ids[0]): -100}).text
    if other == first:
        fail(f"a bias of -100 on token {ids[0]} leaves {short(first)}")
    return "-100 bans one"


def _ids(subject: Subject, text: str) -> list[int]:
    """Token ids of a text, if the server offers /tokenize; else none."""
    fields = {"model": subject.model, "prompt": text, "content": text, "add_special_tokens": False}
    body = subject.client.post("/tokenize", fields).body
    ids = body.get("tokens") or body.get("ids") if isinstance(body, dict) else None
    return [each for each in ids if isinstance(each, int)] if isinstance(ids, list) else []


def prediction(subject: Subject) -> str:
    """Predicted outputs."""
    plain = subject.story()
    fields = {"prediction": {"type": "content", "content": plain.text}}
    answer = subject.ask(STORY, max_tokens=40, **fields)
    same_text(plain.text, answer.text, "the text with a prediction")
    details = answer.usage.get("completion_tokens_details") or {}
    accepted, rejected = (details.get(f"{name}_prediction_tokens") for name in ("accepted", "rejected"))
    if not accepted and not rejected:
        silent("prediction was accepted, but usage counts no token of it")
    demand(accepted, f"the prediction was the text itself, but {accepted} tokens were accepted")
    return f"{accepted} accepted, {rejected} rejected of {plain.tokens} tokens"


def honest_fields(subject: Subject) -> str:
    """Fields for features that servers rarely have."""
    ignored, broken = list[str](), list[str]()
    for fields, has_no_effect in _rare_features():
        reply = subject.client.post(CHAT, subject.body(STORY, **{"max_tokens": 4, **fields}))
        if reply.status == 200 and has_no_effect(reply.body):
            ignored.append(next(iter(fields)))
        elif reply.status >= 500 and reply.status != 501:
            broken.append(f"HTTP {reply.status} for {json.dumps(fields)[:60]}")
    if ignored:
        silent(f"accepted without effect: {', '.join(ignored)}")
    demand(not broken, "; ".join(broken))
    return "audio, an unknown format and an unknown tool_choice are refused"


def _rare_features() -> Iterator[tuple[dict[str, Any], Callable[[Any], bool]]]:
    def no_audio(body: Any) -> bool:
        return not (body["choices"][0].get("message") or {}).get("audio")

    yield {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}, no_audio
    yield {"response_format": {"type": "haast-conform-no-such-format"}}, lambda body: True
    yield {"tool_choice": "haast-conform-no-such-choice"}, lambda body: True


THEME = Theme(
    "sampling",
    (
        Check("greedy-steady", ("A10",), "temperature 0 gives the same text again", greedy_steady),
        Check("temperature", ("A9",), "a high temperature samples", temperature),
        Check("tiny-temperature", ("A9",), "tiny temperatures and huge top_k give no 5xx", tiny_temperature),
        Check("seed", ("A9",), "a seed gives the same text again, other seeds give other texts", seed),
        Check("seed-busy", ("A9", "A19"), "a seed gives the same text among seven other requests", seed_busy),
        Check("n", (), "n choices differ, and a seed gives the same ones again", choices),
        Check("top-p", (), "a tiny top_p is greedy", _narrowing("top_p", 0.001)),
        Check("top-k", (), "top_k=1 is greedy", _narrowing("top_k", 1)),
        Check("min-p", ("A7",), "min_p near 1 is greedy", _narrowing("min_p", 0.999)),
        Check("presence-penalty", ("A7",), "presence_penalty has its effect", _penalty("presence_penalty", 2.0)),
        Check("frequency-penalty", ("A7",), "frequency_penalty has its effect", _penalty("frequency_penalty", 2.0)),
        Check("repetition-penalty", ("A7",), "repetition_penalty has its effect", _penalty("repetition_penalty", 1.8)),
        Check("logit-bias", ("A7",), "logit_bias forces and bans", logit_bias),
        Check("prediction", (), "a prediction is counted and changes nothing", prediction),
        Check(
            "honest-fields", (), "unsupported features are refused: audio, unknown formats and choices", honest_fields
        ),
    ),
)
