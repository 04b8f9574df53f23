"""Separates reasoning from the answer by the marks in the model's chat template. Works on text, not on tokens."""

from __future__ import annotations

from dataclasses import dataclass

# Marks of reasoning in chat templates; a template uses the first pair that it contains.
_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"))


@dataclass(frozen=True)
class ReasoningMarks:
    """The strings that open and close the reasoning."""

    open: str
    close: str

    def opened_by(self, prompt: str) -> bool:
        """Whether the prompt ends with the opening mark, so that the answer starts inside the reasoning."""
        return prompt.rstrip().endswith(self.open)


def marks_of(template: str) -> ReasoningMarks | None:
    """The marks of a chat template; None if it has no reasoning."""
    return next((ReasoningMarks(*pair) for pair in _MARKS if pair[1] in template), None)


class ReasoningReader:
    """Splits a streamed text into reasoning and answer; the result does not depend on where it is cut into pieces.

    Args:
        marks: of the template; None: all is answer.
        opened: the prompt has opened the reasoning.
    """

    def __init__(self, marks: ReasoningMarks | None, opened: bool) -> None:
        self._marks, self.inside = marks, opened and marks is not None
        self._buffer = ""
        self._may_open = marks is not None and not opened  # whether reasoning may still start

    def push(self, text: str) -> tuple[str, str]:
        """Add a piece of text; returns (reasoning, answer) that are final now."""
        if self._marks is None or not (self.inside or self._may_open):
            return "", text
        self._buffer += text
        if self._may_open:
            start = self._buffer.lstrip()
            if self._marks.open.startswith(start):  # may still become the opening mark
                if start == self._marks.open:
                    self._buffer, self._may_open, self.inside = "", False, True
                return "", ""
            self._may_open = False
            if not start.startswith(self._marks.open):
                return "", self._take_buffer()
            self._buffer, self.inside = start[len(self._marks.open) :], True
        before, mark, after = self._buffer.partition(self._marks.close)
        if mark:
            self.inside, self._buffer = False, ""
            return before, after
        longest = min(len(self._marks.close) - 1, len(self._buffer))
        keep = next((n for n in range(longest, 0, -1) if self._buffer.endswith(self._marks.close[:n])), 0)
        reasoning, self._buffer = self._buffer[: len(self._buffer) - keep], self._buffer[len(self._buffer) - keep :]
        return reasoning, ""

    def finish(self) -> tuple[str, str]:
        """End the text; returns (reasoning, answer) that was held back."""
        rest = self._take_buffer()
        return (rest, "") if self.inside else ("", rest)

    def _take_buffer(self) -> str:
        rest, self._buffer = self._buffer, ""
        return rest
