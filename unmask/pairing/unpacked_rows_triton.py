"""`unpack_rows` and `answer_rows` as Triton kernels that read and write pinned memory."""

from __future__ import annotations

import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]
from torch import Tensor

from unmask.pairing.mailbox import Mailbox
from unmask.pairing.mailbox_words import BEGUN, REPLY, signed
from unmask.pairing.packed_rows_triton import TYPES
from unmask.pairing.unpacked_rows import PAGES, Destination

_PADDING = 128


# Values that differ from step to step must not be compiled into a kernel of their own.
@triton.jit(do_not_specialize=["rows_address", "seen_address", "tag", "requests"])
def _settle(
    rows_address,
    seen_address,
    tag,
    requests,
    inputs,
    inputs_stride,
    plan,
    REQUESTS: tl.constexpr,
):
    """What a request's column says from now on, and where its rows go. One program reads the mailbox for all others,
    which would each have to cross the bus."""
    request = tl.arange(0, REQUESTS)
    known = request < requests
    box = rows_address.to(tl.pointer_type(tl.int32)) + 4 * request
    seen = seen_address.to(tl.pointer_type(tl.int32)) + 4 * request
    start = tl.load(box, mask=known, other=0)
    count = tl.load(box + 1, mask=known, other=0)
    last = tl.load(box + 2, mask=known, other=0)
    found = tl.load(box + 3, mask=known, other=0)
    most = tl.load(inputs + inputs_stride + request, mask=known, other=0)
    before = tl.load(inputs + 2 * inputs_stride + request, mask=known, other=-1)
    is_own = known & (found == tag) & (count > 0) & (count <= most)
    is_served = is_own & (start == before)
    taken = tl.where(is_own, count, 0)
    length = tl.where(is_served, start + count, 0)
    tl.store(inputs + request, tl.where(is_served, tl.maximum(last, 0), 0), mask=known)
    tl.store(inputs + inputs_stride + request, length, mask=known)
    tl.store(inputs + 2 * inputs_stride + request, length, mask=known)
    tl.store(plan + 4 * request, tl.cumsum(taken, 0) - taken, mask=known)
    tl.store(plan + 4 * request + 1, taken, mask=known)
    tl.store(plan + 4 * request + 2, start, mask=known)
    tl.store(plan + 4 * request + 3, is_served.to(tl.int32), mask=known)
    tl.store(plan + 4 * requests, tl.sum(taken, axis=0))
    tl.store(seen, start, mask=known)
    tl.store(seen + 1, count, mask=known)
    tl.store(seen + 2, last, mask=known)
    tl.store(seen + 3, found, mask=known)


@triton.jit(do_not_specialize=["features_address", "requests", "size"])
def _unpack(
    features_address,
    requests,
    size,
    inputs,
    inputs_stride,
    plan,
    rows,
    places,
    places_stride,
    spare_slot,
    num_positions,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    FIRST_PAGE: tl.constexpr,
    PADDING: tl.constexpr,
    TYPE: tl.constexpr,
):
    request, row = tl.program_id(0), tl.program_id(1)
    first = tl.load(plan + 4 * request)
    if request == requests:
        # The last of the programs along this axis: `first` is the number of all rows.
        if row == 0:
            for begin in range(first, size, PADDING):
                place = begin + tl.arange(0, PADDING)
                is_padding = place < size
                nothing = tl.zeros([PADDING], tl.int64)
                tl.store(places + place, nothing, mask=is_padding)
                tl.store(places + places_stride + place, nothing + spare_slot, mask=is_padding)
    else:
        count = tl.load(plan + 4 * request + 1)
        if row < count:
            position = tl.load(plan + 4 * request + 2) + row
            is_served = tl.load(plan + 4 * request + 3) != 0
            page = tl.load(inputs + (FIRST_PAGE + position // PAGE) * inputs_stride + request, mask=is_served, other=0)
            slot = page.to(tl.int64) * PAGE + position % PAGE
            position = tl.where(is_served, tl.minimum(position, num_positions - 1), 0)
            tl.store(places + first + row, position.to(tl.int64))
            tl.store(places + places_stride + first + row, tl.where(is_served, slot, spare_slot))
            columns = tl.arange(0, BLOCK)
            inside = columns < WIDTH
            at = (first + row).to(tl.int64) * WIDTH + columns
            values = tl.load(features_address.to(tl.pointer_type(TYPE)) + at, mask=inside)
            tl.store(rows + at, values.to(rows.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["address", "rows_address", "tokens_address", "seen_address", "tag", "k"])
def _answer(
    address,
    rows_address,
    tokens_address,
    seen_address,
    tag,
    k,
    ids,
    inputs,
    inputs_stride,
    num_positions,
    MAX_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BEGUN_AT: tl.constexpr,
    REPLY_AT: tl.constexpr,
):
    request = tl.program_id(0)
    box = rows_address.to(tl.pointer_type(tl.int32)) + 4 * request
    length = tl.load(inputs + 2 * inputs_stride + request)
    is_wanted = (tl.load(box + 3) == tag) & (tl.load(box + 2) >= 0) & (length > 0)
    is_wanted = is_wanted & (tl.load(box) + tl.load(box + 1) == length) & (length + k < num_positions)
    column = tl.arange(0, BLOCK)
    stored = is_wanted & (column < k)
    words = tag.to(tl.int64) << 32 | tl.load(ids + request * k + column, mask=stored, other=0)
    out = tokens_address.to(tl.pointer_type(tl.int64)) + request * MAX_K + column
    tl.store(out, words, mask=stored)
    if request == 0:
        seen = seen_address.to(tl.pointer_type(tl.int32))
        tl.store(seen, tl.load((address + BEGUN_AT).to(tl.pointer_type(tl.int32)), volatile=True))
        tl.store(seen + 1, tl.load((address + REPLY_AT).to(tl.pointer_type(tl.int32)), volatile=True))


def unpack_rows_on_gpu(
    mailbox: Mailbox,
    address: int,
    number: int,
    num_requests: int,
    longest: int,
    into: Destination,
    seen: Tensor,
    plan: Tensor,
) -> None:
    """See `unpack_rows`; queued on the current stream.

    Args:
        address: of the mailbox's first byte, as the device sees it.
        into: device tensors; `rows` in the mailbox's element type, or any if the mailbox's is `EIGHT_BIT`.
        seen: pinned.
        plan: int32 [R + 1 or more, 4] on the device, to be overwritten.
    """
    layout = mailbox.layout
    _settle[(1,)](
        address + layout.rows_at,
        seen.data_ptr(),
        signed(number),
        num_requests,
        into.inputs,
        into.inputs.stride(0),
        plan,
        REQUESTS=triton.next_power_of_2(layout.max_requests),
    )
    _unpack[(num_requests + 1, longest)](
        address + layout.features_at,
        num_requests,
        into.places.shape[1],
        into.inputs,
        into.inputs.stride(0),
        plan,
        into.rows,
        into.places,
        into.places.stride(0),
        into.spare_slot,
        into.num_positions,
        WIDTH=layout.width,
        BLOCK=triton.next_power_of_2(layout.width),
        PAGE=into.page_size,
        FIRST_PAGE=PAGES,
        PADDING=_PADDING,
        TYPE=TYPES[layout.dtype],
        num_warps=8,
    )


def answer_rows_on_gpu(
    mailbox: Mailbox, address: int, number: int, num_requests: int, ids: Tensor, into: Destination, seen: Tensor
) -> None:
    """See `answer_rows`; queued on the current stream. `ids` is contiguous."""
    layout = mailbox.layout
    _answer[(num_requests,)](
        address,
        address + layout.rows_at,
        address + layout.tokens_at,
        seen.data_ptr(),
        signed(number),
        ids.shape[1],
        ids,
        into.inputs,
        into.inputs.stride(0),
        into.num_positions,
        MAX_K=layout.max_k,
        BLOCK=triton.next_power_of_2(layout.max_k),
        BEGUN_AT=BEGUN,
        REPLY_AT=REPLY,
    )
