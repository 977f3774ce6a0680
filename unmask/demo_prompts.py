"""The project's own prompts: arithmetic word problems, narrow on purpose.

A small draft trained for minutes predicts text of a narrow domain well and of a broad one badly, so a
demo that is to show a working draft needs few templates. Tune `TRAINED` and `NEW`; everything else follows.
"""

from __future__ import annotations

import random
from typing import Literal, get_args

Split = Literal["train", "new_items", "new_templates"]

PROMPTS_PER_TEMPLATE = 150
HELD_OUT_PER_TEMPLATE = 16
_SEED = 20

TRAINED = {
    "buys": "{name} has {large} {item}. {name} buys {small} more {item}. How many {item} does {name} have now?",
    "gives": "{name} has {large} {item} and gives {small} {item} to {other}. How many {item} does {name} have left?",
    "box_and_bag": "There are {large} {item} in a box and {small} {item} in a bag. How many {item} are there in total?",
    "boxes": "{name} puts {large} {item} in each of {times} boxes. How many {item} does {name} need?",
    "together": "{name} has {large} {item} and {other} has {small} {item}. How many {item} do they have together?",
    "shares": "{name} shares {multiple} {item} equally among {times} friends. How many {item} does each friend get?",
    "sells": "A shop has {large} {item} and sells {small} {item}. How many {item} are left in the shop?",
    "every_day": "{name} finds {small} {item} every day for {times} days. How many {item} does {name} find?",
}
"""Templates that a draft is trained on. Slots: name, other, item, large (20-60), small (2-19), times (2-9), and
multiple (small * times)."""

NEW = {
    "loses": "{name} had {large} {item} but lost {small} {item} on the way home. "
    "How many {item} does {name} still have?",
    "packs": "Each pack holds {times} {item}. {name} buys {small} packs. How many {item} does {name} buy?",
    "collect": "{name} and {other} collect {item}. {name} collects {large} {item} and {other} collects {small} {item}. "
    "How many {item} do they collect in all?",
}
"""Templates that are never trained on."""

_NAMES = (
    *("Tom", "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate"),
    *("Leo", "Mia", "Noah", "Olivia", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Zoe", "Max"),
)
_ITEMS = (
    *("apples", "books", "coins", "marbles", "pencils", "stamps", "oranges", "cookies", "stickers", "shells"),
    *("cards", "flowers", "balloons", "candles", "buttons", "eggs", "lemons", "pens", "stones", "toys"),
)


def demo_rows(split: Split) -> list[dict[str, str]]:
    """Rows `{"prompt": ..., "template": ...}` of a split, in a fixed order, the same in every run.

    `train` and `new_items` share templates but no prompt; `new_templates` shares nothing with them. Templates
    take turns, so that the first rows of a split hold all of them.

    Raises:
        ValueError: an unknown split.
    """
    if split not in get_args(Split):
        raise ValueError(f"demo split must be one of {', '.join(get_args(Split))}, not '{split}'")
    first = 0 if split != "new_items" else PROMPTS_PER_TEMPLATE
    count = PROMPTS_PER_TEMPLATE if split == "train" else HELD_OUT_PER_TEMPLATE
    columns = [
        [{"prompt": prompt, "template": name} for prompt in _instances(name, template)[first : first + count]]
        for name, template in (NEW if split == "new_templates" else TRAINED).items()
    ]
    return [row for turn in zip(*columns, strict=True) for row in turn]


def demo_prompts(split: Split) -> list[str]:
    """The prompts of a split, as plain text (see `demo_rows`)."""
    return [row["prompt"] for row in demo_rows(split)]


def _instances(name: str, template: str) -> list[str]:
    """Distinct prompts of one template; a prefix is for training, the rest is held out."""
    rng = random.Random(f"{_SEED}/{name}")
    prompts: dict[str, None] = {}
    while len(prompts) < PROMPTS_PER_TEMPLATE + HELD_OUT_PER_TEMPLATE:
        prompts.setdefault(template.format_map(_slots(rng)))
    return list(prompts)


def _slots(rng: random.Random) -> dict[str, str | int]:
    name, other = rng.sample(_NAMES, 2)
    small, times = rng.randint(2, 19), rng.randint(2, 9)
    return {
        "name": name,
        "other": other,
        "item": rng.choice(_ITEMS),
        "large": rng.randint(20, 60),
        "small": small,
        "times": times,
        "multiple": small * times,
    }
