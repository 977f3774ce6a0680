"""Numbers to copy: a task that the toy target learns in a minute, with a phrase in front that nobody can foresee."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal, get_args

Split = Literal["train", "test"]

_DIGITS = "123456789"
_LENGTH = 8
_OPENINGS = ("it is ", "we get ", "so: ", "this: ")


def copying_rows(split: Split) -> Iterator[dict[str, str]]:
    """Rows `{"prompt", "response", "answer"}` of a split, without end; the same in every run.

    A test number never occurs in training.

    Raises:
        ValueError: an unknown split.
    """
    if split not in get_args(Split):
        raise ValueError(f"copying has the splits {', '.join(get_args(Split))}, not '{split}'")
    rng = random.Random(split)
    while True:
        number = "".join(rng.choices(_DIGITS, k=_LENGTH))
        if (int(number) % 7 == 0) == (split == "test"):
            yield {"prompt": f"copy {number}", "response": f"{rng.choice(_OPENINGS)}{number}", "answer": number}
