"""`pack_rows` as one Triton kernel that stores straight into pinned memory."""

from __future__ import annotations

import torch
import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]
from torch import Tensor

from unmask.pairing.mailbox import Mailbox
from unmask.pairing.mailbox_words import signed
from unmask.pairing.packed_rows import StepTensors
from unmask.pairing.wire import EIGHT_BIT

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    EIGHT_BIT: tl.float8e4nv,
}
"""Of feature rows."""


# Values that differ from step to step must not be compiled into a kernel of their own.
@triton.jit(do_not_specialize=["rows_address", "features_address", "tag"])
def _pack(
    features,
    feature_stride,
    positions,
    query_starts,
    num_sampled,
    num_rejected,
    slots,
    last_sampled,
    rows_address,
    features_address,
    tag,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    REQUESTS: tl.constexpr,
    TYPE: tl.constexpr,
):
    row = tl.program_id(0)
    request = tl.program_id(1)
    offsets = tl.arange(0, REQUESTS)
    before = offsets < request
    first = tl.load(query_starts + offsets, mask=before, other=0)
    last = tl.load(query_starts + offsets + 1, mask=before, other=0)
    rejected = tl.load(num_rejected + offsets, mask=before, other=0)
    filled = tl.sum(tl.where(before, last - first - rejected, 0), axis=0)
    start = tl.load(query_starts + request)
    kept = tl.load(query_starts + request + 1) - start - tl.load(num_rejected + request)
    if row < kept:
        columns = tl.arange(0, BLOCK)
        inside = columns < WIDTH
        values = tl.load(features + (start + row).to(tl.int64) * feature_stride + columns, mask=inside)
        out = features_address.to(tl.pointer_type(TYPE))
        tl.store(out + (filled + row).to(tl.int64) * WIDTH + columns, values, mask=inside)
    if row == 0:
        slot = tl.load(slots + request)
        anchor = tl.load(last_sampled + slot).to(tl.int32)
        anchor = tl.where(tl.load(num_sampled + request) > 0, anchor, -1)
        out_row = rows_address.to(tl.pointer_type(tl.int32)) + 4 * request
        tl.store(out_row, tl.load(positions + start).to(tl.int32))
        tl.store(out_row + 1, kept.to(tl.int32))
        tl.store(out_row + 2, anchor)
        tl.store(out_row + 3, tag.to(tl.int32))


def pack_rows_on_gpu(
    mailbox: Mailbox, address: int, step: StepTensors, features: Tensor, number: int, longest: int
) -> None:
    """See `pack_rows`; queued on the current stream.

    Args:
        mailbox: whose layout is meant.
        address: of its first byte, as the device sees it.
        step: device tensors; `query_starts` may be longer than needed.
        features: [T, H], rows contiguous, in the mailbox's element type.
        number: the step.
        longest: most query rows of one request.
    """
    layout = mailbox.layout
    # The second axis ends at 65,535; a prompt may be longer.
    _pack[(longest, len(step.slots))](
        features,
        features.stride(0),
        step.positions,
        step.query_starts,
        step.num_sampled,
        step.num_rejected,
        step.slots,
        step.last_sampled,
        address + layout.rows_at,
        address + layout.features_at,
        signed(number),
        WIDTH=layout.width,
        BLOCK=triton.next_power_of_2(layout.width),
        REQUESTS=triton.next_power_of_2(layout.max_requests),
        TYPE=TYPES[layout.dtype],
        num_warps=8,
    )
