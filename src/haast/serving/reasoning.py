"""Reasoning apart from the answer, by the marks of the model's chat template. Knows no tokens."""

from __future__ import annotations

from dataclasses import dataclass

# How templates mark reasoning; the first pair that a template has is its own.
_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"))


@dataclass(frozen=True)
class ReasoningMarks:
    """What opens and what closes a text's reasoning."""

    open: str
    close: str

    def opened_by(self, prompt: str) -> bool:
        """Whether a prompt ends inside a reasoning that the answer goes on with."""
        return prompt.rstrip().endswith(self.open)


def marks_of(template: str) -> ReasoningMarks | None:
    """The marks that a chat template has; None where it knows no reasoning."""
    return next((ReasoningMarks(*pair) for pair in _MARKS if pair[1] in template), None)


class ReasoningReader:
    """Divides a text that comes in pieces into reasoning and answer; the same however it is cut.

    Args:
        marks: of the template; None: there is no reasoning.
        opened: the prompt has opened it.
    """

    def __init__(self, marks: ReasoningMarks | None, opened: bool) -> None:
        self._marks, self.inside = marks, opened and marks is not None
        self._held = ""
        self._before = marks is not None and not opened  # whether reasoning may still begin

    def push(self, text: str) -> tuple[str, str]:
        """The next piece; returns what became certain of the reasoning, and of the answer."""
        if self._marks is None or not (self.inside or self._before):
            return "", text
        self._held += text
        if self._before:
            begun = self._held.lstrip()
            if self._marks.open.startswith(begun):  # all of it may still be the mark's beginning
                if begun == self._marks.open:
                    self._held, self._before, self.inside = "", False, True
                return "", ""
            self._before = False
            if not begun.startswith(self._marks.open):
                return "", self._take()
            self._held, self.inside = begun[len(self._marks.open) :], True
        before, mark, after = self._held.partition(self._marks.close)
        if mark:
            self.inside, self._held = False, ""
            return before, after
        longest = min(len(self._marks.close) - 1, len(self._held))
        keep = next((n for n in range(longest, 0, -1) if self._held.endswith(self._marks.close[:n])), 0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given, ""

    def finish(self) -> tuple[str, str]:
        """The text ends here: what was held is what it looks like."""
        held = self._take()
        return (held, "") if self.inside else ("", held)

    def _take(self) -> str:
        held, self._held = self._held, ""
        return held
