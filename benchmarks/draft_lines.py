"""What the cases of the draft benchmark change: lines of the table, optimisers, second stages."""

from __future__ import annotations

from typing import Any, Literal

SEEDS = range(3)
ABLATIONS: list[tuple[str, dict[str, Any]]] = [
    ("decay x ce", {}),
    ("d_pace x ce", {"weighting": "d_pace"}),
    ("first_miss x ce", {"weighting": "first_miss"}),
    ("decay x lk_hybrid", {"loss": "lk_hybrid"}),
    ("beta .5 target_relative T .5 late", {"beta": 0.5, "gate": "target_relative", "certainty_start": 0.3}),
    ("beta .5 right T .5 late", {"beta": 0.5, "gate": "right", "certainty_start": 0.3}),
    ("beta 2 right T .5", {"beta": 2.0, "gate": "right"}),
    ("decay x kl", {"loss": "kl"}),
    ("beta .5 prefix_right T .5 late", {"beta": 0.5, "gate": "prefix_right", "certainty_start": 0.3}),
    ("beta .5 target_relative T 1 late",
     {"beta": 0.5, "gate": "target_relative", "certainty_start": 0.3, "entropy_temperature": 1.0}),
    ("beta .1 target_relative T .5 late", {"beta": 0.1, "gate": "target_relative", "certainty_start": 0.3}),
    ("d_pace x lk_hybrid", {"weighting": "d_pace", "loss": "lk_hybrid"}),
    ("decay x tv", {"loss": "tv"}),
    ("first_miss x kl", {"weighting": "first_miss", "loss": "kl"}),
    ("first_miss x ce, beta .5 target_relative T .5 late",
     {"weighting": "first_miss", "beta": 0.5, "gate": "target_relative", "certainty_start": 0.3}),
    ("first_miss x ce, beta .5 prefix_right T .5 late",
     {"weighting": "first_miss", "beta": 0.5, "gate": "prefix_right", "certainty_start": 0.3}),
    ("first_miss x kl, beta .5 target_relative T .5 late",
     {"weighting": "first_miss", "loss": "kl", "beta": 0.5, "gate": "target_relative", "certainty_start": 0.3}),
    ("first_miss x kl, beta .5 prefix_right T .5 late",
     {"weighting": "first_miss", "loss": "kl", "beta": 0.5, "gate": "prefix_right", "certainty_start": 0.3}),
    ("first_miss x kl with the target at T .5", {"weighting": "first_miss", "loss": "kl", "target_temperature": 0.5}),
    ("d_pace x kl", {"weighting": "d_pace", "loss": "kl"}),
    ("d_pace x kl, beta .5 prefix_right T .5 late",
     {"weighting": "d_pace", "loss": "kl", "beta": 0.5, "gate": "prefix_right", "certainty_start": 0.3}),
]  # fmt: skip
"""The table, most telling lines first; equal tokens."""
PUBLISHED: dict[str, Any] = {
    "weighting": "decay", "loss": "ce", "target_temperature": 1.0, "beta": 0.0, "certainty_start": 0.0
}  # fmt: skip
"""What the lines of the table change."""
NO_CERTAINTY: dict[str, Any] = {"beta": 0.0}
"""Of what was chosen before the certainty term was: optimisers and their rates."""
MAINS: dict[str, dict[str, Any]] = {
    "main": {}, "no-certainty": NO_CERTAINTY, "published": PUBLISHED, "wide": {}, "d_pace": {"weighting": "d_pace"},
    "wide-d_pace": {"weighting": "d_pace"},
}  # fmt: skip
"""What is trained for the whole time, and how it departs from the default; `wide` has twice the anchors."""
EQUAL = ("no-certainty", "wide", "d_pace", "wide-d_pace")
"""Of these, what is trained for the steps of `speculators` too."""
ADAMW: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1.5e-3}
"""What the lines of the table are trained by."""
_FROM_THE_START: dict[str, Any] = {"certainty_start": 0.0}
FURTHER: dict[str, dict[str, Any]] = {
    "adamw-0.0005-plain": ADAMW | NO_CERTAINTY | {"learning_rate": 5e-4},
    "adamw-0.0005": ADAMW | _FROM_THE_START | {"learning_rate": 5e-4},
    "adamw-0.0001": ADAMW | _FROM_THE_START | {"learning_rate": 1e-4},
    "muon-0.004": {"optimizer": "muon", "learning_rate": 4e-3} | _FROM_THE_START,
    "muon-0.0012": {"optimizer": "muon", "learning_rate": 1.2e-3} | _FROM_THE_START,
    "muon-0.0012-plain": {"optimizer": "muon", "learning_rate": 1.2e-3} | NO_CERTAINTY,
}
"""By what the main draft may be trained further: optimiser, highest rate, with the default's certainty term from the
first step on or (`plain`) without one. The best on the prompts kept aside, AdamW at 1e-4, is what
`DistillConfig.further` gives; second stages and confidence heads are trained by that."""
PUBLISHED_RATE = 1e-3
"""Of speculators' recipe for Muon."""
SPECULATORS_RATES = (3e-3, 6e-3, 1.2e-2)
"""At which speculators' trainer is measured beside it."""
SPECULATORS_WIDE = (PUBLISHED_RATE, 6e-3)
"""At which it is measured with twice the anchors."""
BY_DEFAULT = (13, 0, 14, 7, 2, 4, 16, 17)
"""Lines of the table that are trained by the default optimiser too."""
LASTING = (13, 17)
"""Of these, what is trained for longer: the default without its certainty term, and the default."""
_FIRST_MISS: dict[str, Any] = {"weighting": "first_miss"}
_D_PACE: dict[str, Any] = {"weighting": "d_pace"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "first_miss": _FIRST_MISS,
    "cold-0.7": _FIRST_MISS | {"target_temperature": 0.7},
    "cold-0.5": _FIRST_MISS | {"target_temperature": 0.5},
    "cold-0.3": _FIRST_MISS | {"target_temperature": 0.3},
    "cold-0.05": _FIRST_MISS | {"target_temperature": 0.05},
    "plain-cold-0.5": _FIRST_MISS | {"target_temperature": 0.5} | NO_CERTAINTY,
    "d_pace": _D_PACE,
    "d_pace-cold-0.05": _D_PACE | {"target_temperature": 0.05},
    "d_pace-0.25": _D_PACE | {"pace_smoothing": 0.25},
    "d_pace_first_miss": {"weighting": "d_pace_first_miss"},
}
"""Weights and targets by the default optimiser, with the default's certainty term but for `plain`: a colder target (at
0.05 KL is cross-entropy with its argmax), D-PACE, less smoothed, and up to the first miss."""
OPTIMIZERS: list[tuple[Literal["adamw", "muon"], float, str, int, int | None]] = [
    ("muon", 1.5e-3, "target", 2048, 1), ("muon", 3e-3, "target", 2048, 1), ("muon", 6e-3, "target", 2048, 1),
    ("muon", 3e-3, "random", 2048, 1), ("adamw", 1.5e-3, "target", 2048, 1), ("adamw", 3e-3, "target", 2048, 1),
    ("muon", 3e-3, "target", 4096, 1), ("muon", 6e-3, "target", 4096, 1), ("adamw", 1.5e-3, "target", 4096, 1),
    ("adamw", 1.5e-3, "target", 2048, 4), ("muon", 1.5e-3, "target", 2048, 4), ("muon", 3e-3, "target", 2048, 4),
    ("muon", 6e-3, "target", 2048, 4), ("muon", 1.2e-2, "target", 2048, 4), ("muon", 3e-3, "random", 2048, 4),
    ("muon", 2.4e-2, "target", 2048, 4), ("adamw", 3e-3, "target", 2048, 4), ("adamw", 6e-3, "target", 2048, 4),
    ("muon", 6e-3, "target", 4096, 4), ("adamw", 1.5e-3, "target", 2048, None), ("adamw", 3e-3, "target", 2048, None),
    ("adamw", 6e-3, "target", 2048, None), ("muon", 2.4e-2, "target", 2048, 1), ("muon", 2.4e-2, "target", 2048, None),
    ("muon", 1.2e-2, "target", 2048, 1), ("muon", 6e-3, "random", 2048, 1), ("muon", 1.2e-2, "random", 2048, 1),
    ("muon", 6e-3, "random", 2048, 4), ("muon", 1.2e-2, "random", 2048, 4), ("muon", 6e-3, "random", 2048, None),
    ("muon", 1.2e-2, "random", 2048, None), ("muon", 2.4e-2, "random", 2048, 1),
]  # fmt: skip
"""With their highest rate, the weights to start from, anchors a step, and for how many times the steps of `equal`; None
is the time of the main training. Measured on the test prompts, and on those by which a rate is chosen."""
SECOND = ("more of the same", "temperature 1", "temperature 1, rejected anchors first")
"""Second stages from the main draft, equal tokens: the first is what the others have to beat."""
