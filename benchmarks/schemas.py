"""Fifty JSON schemas with a question each: nested objects, enums, patterns, arrays, unions, references. Data only."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def obj(**properties: Schema) -> Schema:
    """An object with these properties, all of them required, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def arr(items: Schema, most: int = 4, least: int = 0) -> Schema:
    """An array of `least` to `most` items."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def text(most: int = 40, **more: Any) -> Schema:
    """A string of at most `most` characters."""
    return {"type": "string", "maxLength": most, **more}


def enum(*values: Any) -> Schema:
    """One of these values."""
    return {"enum": list(values)}


def whole(low: int = 0, high: int = 1000) -> Schema:
    """An integer between two bounds."""
    return {"type": "integer", "minimum": low, "maximum": high}


NUMBER: Schema = {"type": "number", "minimum": 0, "maximum": 100}
YES: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}


def match(pattern: str) -> Schema:
    """A string that matches a pattern."""
    return {"type": "string", "pattern": pattern}


DATE, TIME, HEX = (
    match(r"^20[0-9]{2}-[01][0-9]-[0-3][0-9]$"),
    match(r"^[0-2][0-9]:[0-5][0-9]$"),
    match("^#[0-9a-f]{6}$"),
)
IBAN = match("^[A-Z]{2}[0-9]{8}$")
TREE: Schema = {
    "$defs": {"node": obj(name=text(12), kids={"type": "array", "maxItems": 2, "items": obj(name=text(12))})},
    "$ref": "#/$defs/node",
}

SCHEMAS: list[tuple[str, Schema]] = [
    ("Describe a person.", obj(name=text(), age=whole(0, 120), city=text())),
    ("Describe a book.", obj(title=text(60), author=text(), year=whole(1400, 2030), genres=arr(text(16)))),
    ("What colour is the sky?", obj(colour=enum("red", "green", "blue", "grey"))),
    ("Rate this film from 1 to 5: a slow but beautiful story.", obj(stars=whole(1, 5), reason=text(80))),
    ("Is water wet?", obj(answer=YES, why=text(80))),
    ("Give a date in spring.", obj(date=DATE)),
    ("When does lunch begin and end?", obj(begin=TIME, end=TIME)),
    ("Pick a colour for a warm room.", obj(name=text(20), code=HEX)),
    ("List three fruits.", arr(text(16), 3, 3)),
    ("List the days of a weekend.", arr(enum("Monday", "Friday", "Saturday", "Sunday"), 2, 2)),
    ("Give a point.", obj(x=NUMBER, y=NUMBER)),
    ("Give the corners of a triangle.", arr(obj(x=whole(0, 9), y=whole(0, 9)), 3, 3)),
    ("Describe a shop's order.", obj(id=whole(), items=arr(obj(name=text(20), count=whole(1, 9), price=NUMBER)))),
    ("Is this review good or bad: 'I loved it'?", obj(sentiment=enum("positive", "negative", "neutral"))),
    ("Sort into a class: 'the match ended 2:1'.", obj(topic=enum("sport", "politics", "science"), sure=NUMBER)),
    ("Give a phone number.", obj(phone=match(r"^\+[0-9]{2} [0-9]{3} [0-9]{4}$"))),
    ("Give an e-mail address.", obj(mail=match(r"^[a-z]{2,10}@[a-z]{2,10}\.(org|com)$"))),
    ("Give a version number.", obj(version=match(r"^[0-9]{1,2}\.[0-9]{1,2}\.[0-9]{1,2}$"))),
    ("Name a country and its capital.", obj(country=text(24), capital=text(24), continent=enum("Asia", "Europe"))),
    ("Describe a car.", obj(make=text(16), doors=enum(2, 4, 5), electric=YES)),
    ("Give a recipe.", obj(name=text(), minutes=whole(1, 240), steps=arr(text(60), 4, 1))),
    ("Give an address.", obj(street=text(), number=whole(1, 300), zip=match("^[0-9]{5}$"), city=text(24))),
    ("Describe a company with an address.", obj(name=text(), address=obj(street=text(), city=text(24)), staff=whole())),
    ("A three-level menu.", obj(file=obj(open=obj(key=match("^[A-Z]$")), close=obj(key=match("^[A-Z]$"))))),
    ("Who won: nobody or a player's number?", obj(winner={"anyOf": [NULL, whole(1, 9)]})),
    ("Give a value or an error.", {"anyOf": [obj(value=NUMBER), obj(error=text(40))]}),
    ("Say yes, no, or a number.", {"anyOf": [enum("yes", "no"), whole(0, 9)]}),
    ("A tree of names.", TREE),
    ("Give a chess move.", obj(move=match("^[a-h][1-8][a-h][1-8]$"), piece=enum("pawn", "rook", "queen", "king"))),
    ("The weather now.", obj(place=text(20), celsius=whole(-40, 50), sky=enum("clear", "cloudy", "rain"))),
    ("Write a log line.", obj(level=enum("debug", "info", "warning", "error"), at=TIME, message=text(60))),
    ("A user's rights.", obj(user=text(16), rights=arr(enum("read", "write", "run"), 3, 1))),
    ("A matrix of two rows.", arr(arr(whole(0, 9), 2, 2), 2, 2)),
    ("A playlist.", obj(name=text(24), songs=arr(obj(title=text(24), seconds=whole(10, 600)), 3, 1))),
    ("A quiz question.", obj(question=text(80), options=arr(text(24), 3, 3), answer=whole(0, 2))),
    ("A contact.", obj(name=text(24), phones=arr(match("^[0-9]{6,9}$"), 2, 1), friend=YES)),
    ("A train's stops.", obj(line=match("^[A-Z][0-9]{1,2}$"), stops=arr(obj(name=text(20), at=TIME), 3, 2))),
    ("A translation of 'hello'.", obj(french=text(20), german=text(20), spanish=text(20))),
    ("A licence plate.", obj(plate=match("^[A-Z]{2}-[A-Z]{2} [0-9]{1,4}$"))),
    ("A bank transfer.", obj(source=IBAN, target=IBAN, cents=whole(1, 99999))),
    ("A pixel's colour.", obj(r=whole(0, 255), g=whole(0, 255), b=whole(0, 255))),
    ("A setting.", obj(name=text(16), value={"anyOf": [YES, whole(), text(16), NULL]})),
    ("A ticket.", obj(id=match("^T-[0-9]{4}$"), state=enum("open", "closed"), tags=arr(text(10), 3), owner=text(16))),
    ("A flight.", obj(number=match("^[A-Z]{2}[0-9]{3}$"), gate=match("^[A-F][0-9]{1,2}$"), date=DATE, delayed=YES)),
    ("A dice roll.", arr(whole(1, 6), 5, 5)),
    ("A nested note.", obj(note=obj(title=text(24), body=obj(text=text(80), tags=arr(text(8), 2))), pinned=YES)),
    ("A product.", obj(sku=match("^[A-Z0-9]{6}$"), price=NUMBER, stock=whole(), sizes=arr(enum("S", "M", "L"), 3, 1))),
    ("An animal.", obj(name=text(16), legs=enum(0, 2, 4, 6, 8), eats=arr(enum("plants", "meat"), 2, 1), wild=YES)),
    ("A sensor's readings.", obj(unit=enum("C", "F", "%"), values=arr(NUMBER, 5, 3))),
    ("A poll's result.", obj(question=text(60), votes=obj(yes=whole(), no=whole(), none=whole()), closed=YES)),
]  # fmt: skip
