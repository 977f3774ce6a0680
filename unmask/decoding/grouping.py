"""Which rows share a forward, and the static shape it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unmask.decoding.batch import Shape, Window
from unmask.decoding.decoder import Decoder
from unmask.decoding.generate import round_up
from unmask.denoiser import DecodeState

_MOST_PADDING = 2
"""A row is fed at most this many times its own width."""


@dataclass(frozen=True, slots=True)
class Work:
    """One row's next forward."""

    decoder: Decoder
    state: DecodeState
    window: Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one forward may hold, and how its shape is rounded."""

    fed_columns: int
    """Fed columns of all rows, padding included."""
    logits_bytes: int
    """Float32 logits of all rows, padding included."""
    multiple: int
    """Columns and keys come in multiples of this."""
    rows_power_of_two: bool
    """Round the number of rows up too, so that few shapes occur (CUDA graphs)."""


def group(work: Sequence[Work], limits: Limits, capacity: int) -> list[tuple[list[Work], Shape]]:
    """Cut the work of one step into forwards: rows of one decoder and of similar width, within the limits.

    Prefills and refreshes, which feed whole rows, thus never make rows that feed one block wait for padding.
    """
    ordered = sorted(work, key=lambda item: (id(item.decoder), -item.window.width))
    groups: list[tuple[list[Work], Shape]] = []
    current: list[Work] = []
    for item in ordered:
        if current and not _fits(current, item, limits, capacity):
            groups.append((current, shape_of(current, limits, capacity)))
            current = []
        current = [*current, item]
    return [*groups, (current, shape_of(current, limits, capacity))] if current else []


def shape_of(members: Sequence[Work], limits: Limits, capacity: int) -> Shape:
    """The rounded shape that holds the rows."""
    decoder = members[0].decoder
    windows = [item.window for item in members]
    sampled = [item.state for item in members if item.state.temperature > 0]
    open_width = max(window.open_stop - window.open_start for window in windows)
    open_multiple = decoder.open_multiple if decoder.open_multiple > 1 else limits.multiple
    num_keys = min(round_up(max(window.visible for window in windows), limits.multiple), capacity)
    num_rows = len(members)
    return Shape(
        num_rows=1 << (num_rows - 1).bit_length() if limits.rows_power_of_two else num_rows,
        width=round_up(max(window.width for window in windows), limits.multiple),
        open_width=round_up(open_width, open_multiple),
        num_keys=num_keys if decoder.cached_models else 0,
        sampled=bool(sampled),
        nucleus=any(state.top_p < 1 for state in sampled),
    )


def _fits(members: Sequence[Work], item: Work, limits: Limits, capacity: int) -> bool:
    first = members[0]
    if item.decoder is not first.decoder or item.window.width * _MOST_PADDING < first.window.width:
        return False
    shape = shape_of([*members, item], limits, capacity)
    logits_bytes = shape.num_rows * shape.open_width * item.decoder.denoiser.vocab_size * 4
    return shape.num_rows * shape.width <= limits.fed_columns and logits_bytes <= limits.logits_bytes
