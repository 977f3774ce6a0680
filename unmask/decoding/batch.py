"""One forward's worth of rows: the window each row feeds, packed into one transfer and unpacked on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from unmask.decoding.selection import Sampling
from unmask.denoiser import DecodeState

_HEADER = ("slot", "prompt_len", "start", "stop", "open_start", "open_stop", "visible", "flags", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What one row feeds and reads in one forward; half-open ranges of columns."""

    start: int
    stop: int
    """Fed columns."""
    open_start: int
    open_stop: int
    """Columns whose tokens may be committed; inside the fed ones."""
    visible: int
    """Columns from here on are seen by nobody."""
    flags: int = 0
    """A word of the decoder's own."""

    @property
    def width(self) -> int:
        """Fed columns."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The static shape of a batch; equal shapes can share a CUDA graph."""

    num_rows: int
    width: int
    """T: fed columns, padding included."""
    open_width: int
    """K: read columns, padding included."""
    num_keys: int
    """S: key columns of a cached forward."""
    sampled: bool = False
    nucleus: bool = False
    leading: bool = False
    """The rows are the first ones of the cache, in order: their keys need not be gathered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows on the device. Padding rows repeat the first row in the scratch row of the cache, with nothing open;
    padding columns are written to the scratch column and seen by nobody."""

    shape: Shape
    rows_B: torch.Tensor
    """int64 cache rows."""
    ids_BT: torch.Tensor
    columns_BT: torch.Tensor
    open_ids_BK: torch.Tensor
    open_columns_BK: torch.Tensor
    is_open_BK: torch.Tensor
    """Read columns that are still masked."""
    prompt_lens_B: torch.Tensor
    starts_B: torch.Tensor
    visible_B: torch.Tensor
    flags_B: torch.Tensor
    sampling: Sampling | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A batch as it crosses to the device: one integer tensor, and one of floats where rows sample."""

    shape: Shape
    mask_id: int
    scratch_column: int
    integers: torch.Tensor
    """int64 [B, header + T + K]."""
    floats: torch.Tensor
    """Float32 [B, 2]: temperature, top_p; empty where no row samples."""

    def unpack(self) -> Batch:
        """Spread the packed numbers into a batch; tensor arithmetic only, so it can be part of a CUDA graph."""
        shape = self.shape
        header, ids_BT, open_ids_BK = self.integers.split((len(_HEADER), shape.width, shape.open_width), dim=1)
        slot, prompt_len, start, stop, open_start, open_stop, visible, flags, seed = header.unbind(1)
        columns_BT = start[:, None] + torch.arange(shape.width, device=header.device)
        columns_BT = columns_BT.where(columns_BT < stop[:, None], self.scratch_column)
        open_columns_BK = open_start[:, None] + torch.arange(shape.open_width, device=header.device)
        inside_BK = open_columns_BK < open_stop[:, None]
        sampling = None
        if shape.sampled:
            temperature, top_p = self.floats.unbind(1)
            sampling = Sampling(temperature, top_p, seed, shape.nucleus)
        return Batch(
            shape=shape,
            rows_B=slot,
            ids_BT=ids_BT,
            columns_BT=columns_BT,
            open_ids_BK=open_ids_BK,
            open_columns_BK=open_columns_BK.where(inside_BK, open_start[:, None]),
            is_open_BK=inside_BK & (open_ids_BK == self.mask_id),
            prompt_lens_B=prompt_len,
            starts_B=start,
            visible_B=visible,
            flags_B=flags,
            sampling=sampling,
        )


def pack(
    states: Sequence[DecodeState],
    windows: Sequence[Window],
    shape: Shape,
    *,
    scratch_row: int,
    scratch_column: int,
    device: torch.device,
) -> PackedBatch:
    """Pack rows and their windows into a batch of the given shape (at least as large as they need)."""
    mask_id = states[0].mask_id
    integers = np.zeros((shape.num_rows, len(_HEADER) + shape.width + shape.open_width), dtype=np.int64)
    floats = np.zeros((shape.num_rows, 2), dtype=np.float32)
    for row, (state, window) in enumerate(zip(states, windows, strict=True)):
        own = integers[row]
        own[: len(_HEADER)] = (
            state.slot,
            state.prompt_len,
            window.start,
            window.stop,
            window.open_start,
            window.open_stop,
            window.visible,
            window.flags,
            state.seed,
        )
        own[len(_HEADER) :][: window.width] = state.tokens[window.start : window.stop]
        own[len(_HEADER) + shape.width :][: window.open_stop - window.open_start] = state.tokens[
            window.open_start : window.open_stop
        ]
        floats[row] = (state.temperature, state.top_p)
    padding = integers[len(states) :]
    padding[:] = integers[0]
    padding[:, _HEADER.index("slot")] = scratch_row
    padding[:, _HEADER.index("open_stop")] = padding[:, _HEADER.index("open_start")]
    return PackedBatch(
        shape=shape,
        mask_id=mask_id,
        scratch_column=scratch_column,
        integers=_transfer(integers, device),
        floats=_transfer(floats if shape.sampled else floats[:0], device),
    )


def _transfer(values: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
