"""The plain decoding loop: a fixed set of rows, all in one batch, until the last is done.

It is what the engine is checked against; alone in its batch, a row is the reference for itself in any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unmask.decoding.batch import PackedBatch, Shape, Window, pack
from unmask.decoding.decoder import Decoder
from unmask.decoding.request import Completion, DecodeRequest
from unmask.decoding.slots import Slots
from unmask.denoiser import DecodeState


@torch.inference_mode()
def generate(decoder: Decoder, requests: Sequence[DecodeRequest]) -> list[Completion]:
    """Decode all requests together and return their completions in order.

    Raises:
        PromptError, ConfigError: a request that cannot be decoded; nothing has run then.
    """
    for request in requests:
        request.check(decoder.denoiser)
    slots = Slots(decoder.cached_models, len(requests), max(request.length for request in requests))
    states = [decoder.admit(request, slots.acquire()) for request in requests]
    while live := [state for state in states if state.finish_reason is None]:
        windows = [decoder.window(state) for state in live]
        batch = assemble(decoder, slots, live, windows, exact_shape(decoder, slots, live, windows))
        tokens = decoder.step(batch.unpack(), slots.caches).cpu().numpy()
        for state, window, row in zip(live, windows, tokens, strict=True):
            decoder.advance(state, window, row[: window.open_stop - window.open_start])
            slots.settle(state)
    return [Completion.of(state) for state in states]


def exact_shape(decoder: Decoder, slots: Slots, states: Sequence[DecodeState], windows: Sequence[Window]) -> Shape:
    """The smallest shape that holds these rows."""
    open_width = max(window.open_stop - window.open_start for window in windows)
    return Shape(
        num_rows=len(states),
        width=max(window.width for window in windows),
        open_width=round_up(open_width, decoder.open_multiple),
        num_keys=max(window.visible for window in windows),
        sampled=any(state.temperature > 0 for state in states),
        nucleus=any(state.temperature > 0 and state.top_p < 1 for state in states),
    )


def assemble(
    decoder: Decoder, slots: Slots, states: Sequence[DecodeState], windows: Sequence[Window], shape: Shape
) -> PackedBatch:
    """Announce the windows to the caches and pack the rows."""
    for state, window in zip(states, windows, strict=True):
        slots.announce(state, window, decoder.cached_models)
    return pack(
        states,
        windows,
        shape,
        scratch_row=slots.num_rows,
        scratch_column=slots.capacity,
        device=decoder.denoiser.device,
    )


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple
