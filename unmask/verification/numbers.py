r"""Number answers: `\boxed{7}`, `#### 7`, or the last number of a text."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from unmask.errors import PromptError

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_MARKED = re.compile(r"####(.*)")
# Bounded, since integers of thousands of digits are refused by Python; no sign in `5-3`, no number in `v2`.
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,10}(?![0-9])|[0-9]{1,31})"
_NUMBER = re.compile(rf"(?<![\w.])-?\$?(?:{_WHOLE}(?:\.[0-9]{{1,30}})?|\.[0-9]{{1,30}})(?:/[1-9][0-9]{{0,30}})?")


class NumberVerifier:
    """A response is right if its final number equals the reference's."""

    def reference(self, value: Any) -> Fraction:
        """The final number of a reference: a number, or text such as GSM8K's answers. Raises PromptError."""
        number = final_number(str(value))
        if number is None:
            raise PromptError(f"the reference {str(value)[:40]!r} holds no number", field="generate.reference")
        return number

    def is_right(self, response: str, reference: Fraction) -> bool:
        """See Verifier."""
        return final_number(response) == reference


def final_number(text: str) -> Fraction | None:
    r"""The number that a text ends with: in its last `\boxed{}`, else after its last `####`, else its last one.

    Thousands separators, currency and percent signs are dropped; `3/4` and `0.75` are equal.
    """
    for marked in (_BOXED, _MARKED):
        if found := marked.findall(text):
            text = found[-1]
            break
    numbers = _NUMBER.findall(text)
    return _plain(numbers[-1]) if numbers else None


def _plain(number: str) -> Fraction:
    value, _, divisor = number.replace(",", "").replace("$", "").partition("/")
    return Fraction(value) / int(divisor or 1)
