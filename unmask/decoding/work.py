"""One row's next forward, and how several rows become a batch and take its result back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmask.decoding.batch import PackedBatch, Shape, Window, pack
from unmask.decoding.decoder import Decoder
from unmask.decoding.slots import Slots
from unmask.denoiser import DecodeState


@dataclass(frozen=True, slots=True)
class Work:
    """One row's next forward."""

    decoder: Decoder
    state: DecodeState
    window: Window

    @classmethod
    def of(cls, decoder: Decoder, state: DecodeState) -> Work:
        """What the row wants next."""
        return cls(decoder, state, decoder.window(state))


def shape_of(members: Sequence[Work], capacity: int, *, multiple: int = 1, rows_power_of_two: bool = False) -> Shape:
    """The smallest shape that holds rows of one decoder.

    Args:
        capacity: columns of a cache row, beyond which there are no keys.
        multiple: columns and keys are rounded up to it.
        rows_power_of_two: round the number of rows up too, so that few shapes occur.
    """
    decoder = members[0].decoder
    windows = [item.window for item in members]
    sampled = [item.state for item in members if item.state.temperature > 0]
    open_width = max(window.open_stop - window.open_start for window in windows)
    num_keys = min(round_up(max(window.visible for window in windows), multiple), capacity)
    num_rows = round_rows(len(members)) if rows_power_of_two else len(members)
    return Shape(
        num_rows=num_rows,
        width=round_up(max(window.width for window in windows), multiple),
        open_width=round_up(open_width, decoder.open_multiple or multiple),
        num_keys=num_keys if decoder.cached_models else 0,
        sampled=bool(sampled),
        nucleus=any(state.top_p < 1 for state in sampled),
        leading=bool(decoder.cached_models) and [item.state.slot for item in members] == list(range(num_rows)),
    )


def assemble(members: Sequence[Work], shape: Shape, slots: Slots) -> PackedBatch:
    """Announce the windows to the caches and pack the rows. Raises ValueError for a window that leaves a gap."""
    decoder = members[0].decoder
    for item in members:
        slots.announce(item.state, item.window, decoder.cached_models)
    return pack(
        [item.state for item in members],
        [item.window for item in members],
        shape,
        scratch_row=slots.num_rows,
        scratch_column=slots.capacity,
        device=decoder.denoiser.device,
    )


def conclude(members: Sequence[Work], tokens_BK: np.ndarray, slots: Slots) -> None:
    """Give each row its read columns back (padding rows come last), and forget what is no longer valid in its cache.

    A row that was aborted meanwhile is left alone: its slot may be another's by now.
    """
    for item, tokens_K in zip(members, tokens_BK, strict=False):
        if item.state.finish_reason is not None:
            continue
        window = item.window
        item.decoder.advance(item.state, window, tokens_K[: window.open_stop - window.open_start])
        slots.settle(item.state)


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def round_rows(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
