"""Which rows share a forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unmask.decoding.batch import Shape
from unmask.decoding.decoder import Decoder
from unmask.decoding.work import Work, round_rows, round_up, shape_of
from unmask.denoiser import Denoiser
from unmask.models.transformer import DiffusionLM

_LAUNCHES_A_LAYER_S = 30 * 3e-6
_BYTES_A_SECOND = 2e12
_FLOPS_A_SECOND = 3e14
"""Rough figures of a large GPU; only speed depends on them."""
_CPU_COLUMNS = 32


def forward_overhead(network: Denoiser) -> int:
    """What a forward of a network costs beside its columns, in columns: on a GPU its launches or the reading of its
    weights, whichever takes longer."""
    if network.device.type == "cpu" or not isinstance(network, DiffusionLM):
        return _CPU_COLUMNS
    parameters = sum(p.numel() for p in network.parameters())
    fixed_s = max(network.config.num_layers * _LAUNCHES_A_LAYER_S, 2 * parameters / _BYTES_A_SECOND)
    return int(fixed_s / (2 * parameters / _FLOPS_A_SECOND))


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

    def rows(self, count: int) -> int:
        """Rows that are fed for so many, padding included."""
        return round_rows(count) if self.rows_power_of_two else count

    def most_rows(self, members: Sequence[Work]) -> int:
        """How many of these rows may share a forward; at least 1."""
        shape = self.shape_of(members)
        logits_bytes = shape.open_width * members[0].decoder.denoiser.vocab_size * 4
        most = max(1, min(self.fed_columns // shape.width, self.logits_bytes // logits_bytes))
        return 1 << most.bit_length() - 1 if self.rows_power_of_two else most


def group(work: Sequence[Work], limits: Limits, overhead: Callable[[Decoder], int]) -> list[list[Work]]:
    """Cut the work of one step into forwards of one decoder each, within the limits, so that they cost least.

    Args:
        work: of all rows.
        limits: see `Limits`.
        overhead: what a decoder's forward costs beside its columns, in columns. Where it is low, prefills and
            refreshes, which feed whole rows, never make rows that feed one block pay for padding; where it is high, a
            step is one forward.
    """
    ordered = sorted(work, key=lambda item: (id(item.decoder), -item.window.width))
    groups = []
    for _, members in itertools.groupby(ordered, key=lambda item: id(item.decoder)):
        mine = list(members)
        for start, stop in _cheapest_cuts(mine, limits, overhead(mine[0].decoder)):
            groups += _split(mine[start:stop], limits.most_rows(mine[start:stop]))
    return groups


def _cheapest_cuts(members: Sequence[Work], limits: Limits, overhead: int) -> list[tuple[int, int]]:
    """The cuts of rows of falling width whose forwards cost least: each its overhead, and its columns with padding."""
    widths = [round_up(item.window.width, limits.multiple) for item in members]
    borders = [0, *(i for i in range(1, len(widths)) if widths[i] < widths[i - 1]), len(widths)]

    def cost(start: int, stop: int) -> int:
        most = limits.most_rows(members[start:stop])
        parts = [min(most, stop - first) for first in range(start, stop, most)]
        return len(parts) * overhead + sum(map(limits.rows, parts)) * widths[start]

    best: list[tuple[int, int]] = [(0, 0)]  # of what lies before each border: cost, and the border before
    for end in range(1, len(borders)):
        costs = [best[begin][0] + cost(borders[begin], borders[end]) for begin in range(end)]
        least = min(costs)
        best.append((least, costs.index(least)))
    cuts, end = [], len(borders) - 1
    while end:
        begin = best[end][1]
        cuts.append((borders[begin], borders[end]))
        end = begin
    return cuts[::-1]


def _split(members: list[Work], most: int) -> list[list[Work]]:
    """Each part in the order of its slots: a full engine then finds all its rows where they are in the cache."""
    parts = [members[start : start + most] for start in range(0, len(members), most)]
    return [sorted(part, key=lambda item: item.state.slot) for part in parts]
