"""Which rows share a forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unmask.decoding.batch import Shape
from unmask.decoding.work import Work, shape_of

_MOST_PADDING = 2
"""A row is fed at most this many times its own width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one forward may hold, and how its shape is rounded (see shape_of)."""

    capacity: int
    fed_columns: int
    """Fed columns of all rows, padding included."""
    logits_bytes: int
    """Float32 logits of all rows, padding included."""
    multiple: int
    rows_power_of_two: bool

    def shape_of(self, members: Sequence[Work]) -> Shape:
        """The rounded shape that holds the rows."""
        return shape_of(members, self.capacity, multiple=self.multiple, rows_power_of_two=self.rows_power_of_two)

    def most_rows(self, members: Sequence[Work]) -> int:
        """How many of these rows may share a forward; at least 1."""
        shape = self.shape_of(members)
        logits_bytes = shape.open_width * members[0].decoder.denoiser.vocab_size * 4
        most = max(1, min(self.fed_columns // shape.width, self.logits_bytes // logits_bytes))
        return 1 << most.bit_length() - 1 if self.rows_power_of_two else most


def group(work: Sequence[Work], limits: Limits) -> list[list[Work]]:
    """Cut the work of one step into forwards: rows of one decoder and of similar width, within the limits.

    Prefills and refreshes, which feed whole rows, thus never make rows that feed one block wait for padding.
    """
    similar: list[list[Work]] = []
    for item in sorted(work, key=lambda item: (id(item.decoder), -item.window.width)):
        if similar and _similar(similar[-1][0], item):
            similar[-1].append(item)
        else:
            similar.append([item])
    return [part for members in similar for part in _split(members, limits.most_rows(members))]


def _similar(widest: Work, item: Work) -> bool:
    return item.decoder is widest.decoder and item.window.width * _MOST_PADDING >= widest.window.width


def _split(members: list[Work], most: int) -> list[list[Work]]:
    """Each part in the order of its slots: a full engine then finds all its rows where they are in the cache."""
    parts = [members[start : start + most] for start in range(0, len(members), most)]
    return [sorted(part, key=lambda item: item.state.slot) for part in parts]
