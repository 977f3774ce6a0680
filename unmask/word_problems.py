"""Word problems with worked answers: a task that a small diffusion LM can learn, and that several steps must get right.

A template is a setting with an order of operations; test templates are never trained on. Every sentence of an answer is
worded at random, as in natural text: until a wording is begun, a model cannot know which one it will be.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "test"]
TEST_SHARE = 0.1
"""Share of the templates that are kept for the test split."""
MOST = 500
"""No number of a problem is larger."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a problem plays: how it begins, what is asked, and what each operation is there."""

    begins: str
    asks: str
    noun: str
    gain: str
    lose: str
    double: str
    halve: str
    times: str


SETTINGS = {
    "marbles": Setting(
        "{name} has {v} marbles.", "How many marbles does {name} have now?", "marbles",
        "A friend gives {name} {k} marbles.", "{name} loses {k} of them.", "Then {name} wins as many marbles again.",
        "{name} gives half of the marbles away.", "{name} trades so well that there are {k} times as many.",
    ),
    "bus": Setting(
        "A bus leaves with {v} passengers.", "How many passengers are on the bus?", "passengers",
        "At a stop {k} people get on.", "At a stop {k} people get off.", "At the market the number on board doubles.",
        "At the station half of the people leave.", "At the school it fills to {k} times the number.",
    ),
    "savings": Setting(
        "{name} has {v} dollars.", "How many dollars does {name} have in the end?", "dollars",
        "{name} earns {k} dollars.", "{name} spends {k} dollars.", "An aunt doubles the money.",
        "{name} pays half of it as rent.", "A lucky ticket makes it {k} times as much.",
    ),
    "bakery": Setting(
        "A bakery has {v} loaves.", "How many loaves are there at closing time?", "loaves",
        "The baker bakes {k} more.", "Customers buy {k}.", "A second oven doubles the stock.",
        "Half of the stock goes to a hotel.", "For a fair they bake until there are {k} times as many.",
    ),
    "library": Setting(
        "A shelf holds {v} books.", "How many books are on the shelf?", "books",
        "{name} puts {k} more on it.", "Readers take {k} away.", "A donation doubles the number.",
        "Half of them are moved upstairs.", "After a merger there are {k} times as many.",
    ),
    "farm": Setting(
        "{name} collects {v} eggs.", "How many eggs does {name} have?", "eggs",
        "The hens lay {k} more.", "The dog breaks {k}.", "A neighbour brings the same number again.",
        "Half of the eggs are sold.", "The next barn raises it to {k} times the number.",
    ),
    "tank": Setting(
        "A tank holds {v} liters.", "How many liters are in the tank?", "liters",
        "Rain adds {k} liters.", "{name} draws {k} liters.", "A pump doubles the water.",
        "Half of the water leaks out.", "A river fills it to {k} times the amount.",
    ),
    "game": Setting(
        "{name} starts a round with {v} points.", "How many points does {name} have?", "points",
        "A hit brings {k} points.", "A mistake costs {k} points.", "A bonus doubles the score.",
        "A penalty halves the score.", "A joker makes the score {k} times as high.",
    ),
}  # fmt: skip

OPENINGS = (
    "At the start there are {v} {noun}.",
    "We begin with {v} {noun}.",
    "The number of {noun} is {v} at first.",
)
STEPS = {
    "gain": (
        "Adding {k} gives {v} + {k} = {r} {noun}.",
        "With {k} more there are {v} + {k} = {r}.",
        "Then it grows by {k}, and {v} + {k} = {r}.",
    ),
    "lose": (
        "Taking away {k} leaves {v} - {k} = {r} {noun}.",
        "Without {k} there are {v} - {k} = {r}.",
        "Then it falls by {k}, and {v} - {k} = {r}.",
    ),
    "double": (
        "Doubling gives {v} * 2 = {r} {noun}.",
        "Twice as many are {v} * 2 = {r}.",
        "Then it doubles, and {v} * 2 = {r}.",
    ),
    "halve": (
        "Half of that is {v} / 2 = {r} {noun}.",
        "Only half remains, {v} / 2 = {r}.",
        "Then it is halved, and {v} / 2 = {r}.",
    ),
    "times": (
        "Multiplying by {k} gives {v} * {k} = {r} {noun}.",
        "There are {k} times as many, {v} * {k} = {r}.",
        "Then it is multiplied, and {v} * {k} = {r}.",
    ),
}
ENDING = "The answer is {r}."

_NAMES = ("Tom", "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate")


def word_problem_rows(split: Split, *, seed: int = 0) -> Iterator[dict[str, str]]:
    """Rows `{"prompt", "response", "answer", "template"}` of a split, without end; the same in every run with a seed.

    Raises:
        ValueError: an unknown split.
    """
    if split not in get_args(Split):
        raise ValueError(f"word problems have the splits {', '.join(get_args(Split))}, not '{split}'")
    rng = random.Random(f"{split}-{seed}")
    while True:
        name, operations = rng.choice(sorted(SETTINGS)), _operations(rng)
        template = f"{name}:{'-'.join(operations)}"
        if _is_test(template) != (split == "test"):
            continue
        row = _problem(SETTINGS[name], operations, rng)
        if row is not None:
            yield row | {"template": template}


def _operations(rng: random.Random) -> tuple[str, ...]:
    return tuple(rng.choice(sorted(STEPS)) for _ in range(rng.randint(3, 5)))


def _is_test(template: str) -> bool:
    digest = hashlib.blake2b(template.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") / 2**32 < TEST_SHARE


def _problem(setting: Setting, operations: tuple[str, ...], rng: random.Random) -> dict[str, str] | None:
    """A problem and its answer; None where an operation is impossible on the number that it meets."""
    name, value = rng.choice(_NAMES), rng.randint(4, 90)
    question = [setting.begins.format(name=name, v=value)]
    answer = [rng.choice(OPENINGS).format(v=value, noun=setting.noun)]
    for operation in operations:
        outcome = _apply(operation, value, rng)
        if outcome is None:
            return None
        operand, result = outcome
        question.append(getattr(setting, operation).format(name=name, k=operand))
        wording = rng.choice(STEPS[operation])
        answer.append(wording.format(v=value, k=operand, r=result, noun=setting.noun))
        value = result
    question.append(setting.asks.format(name=name))
    answer.append(ENDING.format(r=value))
    return {"prompt": " ".join(question), "response": " ".join(answer), "answer": str(value)}


def _apply(operation: str, value: int, rng: random.Random) -> tuple[int, int] | None:
    """(operand, result) of an operation on a number, or None where it cannot be done."""
    if operation == "gain":
        operand = rng.randint(2, 60)
        result = value + operand
    elif operation == "lose":
        operand = rng.randint(2, 60)
        result = value - operand
    elif operation == "double":
        operand, result = 2, value * 2
    elif operation == "halve":
        operand, result = 2, value // 2 if value % 2 == 0 else 0
    else:
        operand = rng.randint(3, 5)
        result = value * operand
    return (operand, result) if 0 < result <= MOST else None
