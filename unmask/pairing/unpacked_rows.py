"""What a draft's stream does with a step that has rung: the reference of the kernels, for tests and CPUs.

Nothing here needs the draft's CPU: where rows go was settled before they came (`PageTables.cover`), and how many there
are is read where they are used. A request is served if its rows begin where its context ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.pairing.mailbox import Mailbox
from unmask.pairing.mailbox_words import BEGUN, REPLY, signed

LAST_TOKEN, ANCHOR, LENGTH, GAP_FROM, GAP_TO, PAGES = range(6)
"""Rows of the input table; the pages are the last of them."""
MOST = ANCHOR
"""What lies there until a step has rung: how many rows a request may bring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where the rows of a step are put.

    Attributes:
        inputs: int32 [PAGES + W, B or more], a request a column. LENGTH is the context's length before the step, and
            after it; 0 for a request that is not served. MOST becomes the anchor.
        rows: [T, H] features.
        places: int64 [2, T] their positions and slots.
        page_size: positions per page.
        spare_slot: for rows that pad.
        num_positions: beyond which nothing is drafted.
    """

    inputs: Tensor
    rows: Tensor
    places: Tensor
    page_size: int
    spare_slot: int
    num_positions: int


def unpack_rows(
    mailbox: Mailbox, number: int, num_requests: int, longest: int, into: Destination, seen: Tensor
) -> None:
    """Take the rows of a step out of its mailbox. CPU tensors only.

    Args:
        mailbox, number: the step.
        num_requests: R of it.
        longest: most rows of one request, and no less than any that `into` allows it.
        into: see `Destination`; T is at least the sum of what it allows. A request that brings more is not served.
        seen: int32 [R or more, 4]; the mailbox's rows as they were read.
    """
    seen[:num_requests] = torch.from_numpy(mailbox.rows[:num_requests].copy())
    into.places[0], into.places[1] = 0, into.spare_slot
    filled = 0
    for i, (start, count, last, tag) in enumerate(seen[:num_requests].tolist()):
        is_own = tag == signed(number) and 0 < count <= min(int(into.inputs[MOST, i]), longest)
        if not is_own or start != int(into.inputs[LENGTH, i]):
            into.inputs[:GAP_FROM, i] = 0
            filled += count if is_own else 0
            continue
        positions = torch.arange(start, start + count)
        pages = into.inputs[PAGES + positions // into.page_size, i].long()
        here = slice(filled, filled + count)
        into.places[0, here] = positions.clamp(max=into.num_positions - 1)
        into.places[1, here] = pages * into.page_size + positions % into.page_size
        into.rows[here] = mailbox.features[here].to(into.rows.dtype)
        into.inputs[:GAP_FROM, i] = torch.tensor([max(last, 0), start + count, start + count])
        filled += count


def answer_rows(mailbox: Mailbox, number: int, num_requests: int, ids: Tensor, into: Destination, seen: Tensor) -> None:
    """Store the proposals of a step, without letting its GPU go on. CPU tensors only.

    Args:
        mailbox, number, num_requests, into: of `unpack_rows`.
        ids: [R or more, K].
        seen: int32 [4]; the words BEGUN and REPLY at this time are left in it, the others are not touched.
    """
    seen[0], seen[1] = signed(mailbox.word(BEGUN)), signed(mailbox.word(REPLY))
    k = ids.shape[1]
    for i, (start, count, last, tag) in enumerate(mailbox.rows[:num_requests].tolist()):
        length = int(into.inputs[LENGTH, i])
        if tag == signed(number) and last >= 0 and 0 < length == start + count and length + k < into.num_positions:
            mailbox.tokens[i, :k] = signed(number) << 32 | ids[i].numpy()
