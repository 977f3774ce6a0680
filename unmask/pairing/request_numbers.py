"""The numbers by which a draft knows a target's requests."""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from collections.abc import Iterable

TRACED = 2**32
"""Numbers from here on are the span ids of requests that are traced; others are counted from 1."""

_KNOWN_SPANS = 2**16
_MARK = "~"
_SPAN = re.compile(rf"{_MARK}([0-9a-f]{{16}})(?=-|$)")


def traced_name(name: str, span_id: int) -> str:
    """A request's name that carries the 64-bit id of the span it belongs to; the engine may append to it."""
    return f"{name}{_MARK}{span_id:016x}"


class RequestNumbers:
    """Numbers by name: the span id that a name carries, else one that no request of this target has had.

    Of several requests of one span, such as the choices of one prompt, the first that is asked for has its id, for as
    long as the span is remembered: the end of the first may be told when the second has begun.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._spans: OrderedDict[int, None] = OrderedDict()
        """Ids of the last spans that have been given."""
        self._next = itertools.count(1)

    def of(self, name: str) -> int:
        """The number of a request, the same until it is forgotten."""
        number = self._numbers.get(name)
        if number is None:
            span = _SPAN.search(name)
            number = int(span[1], 16) if span else 0
            is_free = number >= TRACED and number not in self._spans
            number = self._numbers[name] = number if is_free else next(self._next)
            if is_free:
                self._spans[number] = None
                if len(self._spans) > _KNOWN_SPANS:
                    self._spans.popitem(last=False)
        return number

    def forget(self, names: Iterable[str]) -> list[int]:
        """Numbers of requests that have ended, of those that had one."""
        return [self._numbers.pop(name) for name in names if name in self._numbers]

    def forget_all_but(self, names: Iterable[str]) -> list[int]:
        """Numbers of the requests that are not among these any more."""
        return self.forget(self._numbers.keys() - set(names))
