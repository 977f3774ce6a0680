"""The plain decoding loop: a fixed set of rows, all in one batch, until the last is done.

It is what the engine is checked against; alone in its batch, a row is the reference for itself in any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unmask.decoding.decoder import Decoder
from unmask.decoding.request import Completion, DecodeRequest
from unmask.decoding.slots import Slots
from unmask.decoding.work import Work, assemble, conclude, shape_of


@torch.inference_mode()
def generate(decoder: Decoder, requests: Sequence[DecodeRequest]) -> list[Completion]:
    """Decode all requests together and return their completions in order.

    Raises:
        PromptError, ConfigError: a request that cannot be decoded; nothing has run then.
    """
    states = [decoder.admit(request, slot) for slot, request in enumerate(requests)]
    capacity = max((state.length for state in states), default=0)
    slots = Slots(decoder.cached_models, len(states), capacity)
    while live := [Work.of(decoder, state) for state in states if state.finish_reason is None]:
        batch = assemble(live, shape_of(live, capacity), slots)
        conclude(live, decoder.step(batch.unpack(), slots.caches).cpu().numpy(), slots)
    return [Completion.of(state) for state in states]
