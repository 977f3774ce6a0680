"""Token ids to text, piece by piece: no broken character, no half of a stop string, nothing ever taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Text of token ids, special tokens left out."""

BROKEN_CHARACTER = "\ufffd"
"""What decoders put for bytes that are not (or not yet) a character."""


class Detokenizer:
    """Turns tokens into text as they arrive.

    A token's text depends on its neighbours (leading spaces, characters cut across tokens), so each step decodes a
    short window that begins at the last piece given out, and gives out what the window has grown by.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._given = 0
        self._given_text = ""

    def push(self, token_id: int) -> str:
        """Text that has become final with this token; empty while a character is incomplete."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(BROKEN_CHARACTER) or len(text) <= len(self._given_text):
            return ""
        return self._give(text)

    def finish(self) -> str:
        """Text still held back, when no further token will come."""
        text = self._decode(self._window)
        return self._give(text) if len(text) > len(self._given_text) else ""

    def _give(self, text: str) -> str:
        piece = text[len(self._given_text) :]
        self._window = self._window[self._given :]
        self._given = len(self._window)
        self._given_text = self._decode(self._window)
        return piece


class StopStrings:
    """Ends a text before the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def push(self, piece: str) -> str:
        """Text that is certain to come before any stop string. After a match the rest is dropped."""
        text = self._held + piece
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.matched = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Text held back that did not become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a true beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
