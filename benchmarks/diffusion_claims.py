"""What the rows of `diffusion_quality` say of forwards at equal accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def claims(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """What the table says of forwards at equal accuracy; None where no setting is as accurate.

    `dparallel_over_one_token`: times fewer forwards than one token a forward, at most 2 points below it.
    `dparallel_over_threshold`: than the teacher's threshold decoder, both interpolated at the accuracy of that setting
    or, where the threshold never reaches it, at its best. `d2f_tpf` and `apd_tpf`: the most tokens a forward
    (APD: a step) at most 2 and 5 points below.
    """
    found = [row for row in rows if row["task"] == "word_problems"]

    def of(checkpoint: str, decoder: str) -> list[dict[str, Any]]:
        return [row for row in found if (row["checkpoint"], row["decoder"]) == (checkpoint, decoder)]

    ceiling = next(iter(of("teacher", "one_token")), None)
    if ceiling is None:
        return {}

    def fastest(table: list[dict[str, Any]], loss: float) -> dict[str, Any] | None:
        accurate = [row for row in table if row["accuracy"] >= ceiling["accuracy"] - loss]
        return min(accurate, key=lambda row: row["nfe"], default=None)

    plain = [row for row in of("teacher", "threshold") if "cache" not in row["settings"]]
    certain = [row for row in of("dparallel", "dparallel") if "cache" not in row["settings"]]
    student, d2f = fastest(certain, 2), fastest(of("d2f", "d2f"), 2)
    apd = fastest(of("teacher", "apd") + of("dparallel", "apd"), 5)
    equal = min(student["accuracy"], max(row["accuracy"] for row in plain)) if student and plain else None
    return {
        "dparallel_over_one_token": ceiling["nfe"] / student["nfe"] if student else None,
        "dparallel_over_threshold": _ratio(plain, certain, equal) if equal is not None else None,
        "d2f_tpf": d2f["tpf"] if d2f else None,
        "apd_tpf": apd["tpf"] if apd else None,
    }


def _ratio(slow: Sequence[dict[str, Any]], fast: Sequence[dict[str, Any]], accuracy: float) -> float | None:
    """Of the forwards of two curves at an accuracy."""
    many, few = forwards_at(slow, accuracy), forwards_at(fast, accuracy)
    return many / few if many and few else None


def forwards_at(curve: Sequence[dict[str, Any]], accuracy: float) -> float | None:
    """The fewest forwards of a curve at an accuracy, linear between the settings that no other one beats in both;
    None above all of them."""
    every = sorted((row["accuracy"], row["nfe"]) for row in curve)
    points = [p for i, p in enumerate(every) if all(nfe > p[1] for _, nfe in every[i + 1 :])]
    above = next((place for place, (reached, _) in enumerate(points) if reached >= accuracy), None)
    if above is None:
        return None
    if above == 0:
        return points[0][1]
    (low, few), (high, many) = points[above - 1], points[above]
    return few + (many - few) * (accuracy - low) / max(high - low, 1e-9)
