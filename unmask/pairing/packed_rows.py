"""What a target's step leaves for its draft, from device tensors alone: the reference of the kernel.

A request's query is its anchor and the drafts that were verified, or a chunk of its prompt. The anchor and the accepted
drafts stay; the last sampled token is the next anchor. The target's CPU does not know yet how many were accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unmask.pairing.mailbox import Mailbox
from unmask.pairing.mailbox_words import signed


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTensors:
    """One step of a target with R requests and T query rows, as its sampler left it.

    Attributes:
        positions: of the query rows [T].
        query_starts: first query row of each request, and the end [R + 1].
        num_sampled: tokens that each request gained [R]; 0 inside a prompt.
        num_rejected: drafts of each request that were not accepted [R].
        slots: where each request's state lies [R].
        last_sampled: newest token, by slot.
    """

    positions: Tensor
    query_starts: Tensor
    num_sampled: Tensor
    num_rejected: Tensor
    slots: Tensor
    last_sampled: Tensor


def pack_rows(mailbox: Mailbox, step: StepTensors, features: Tensor, number: int) -> None:
    """Store rows and surviving features [T, H] of a step in its mailbox. CPU tensors only."""
    filled = 0
    starts, last_sampled = step.query_starts.tolist(), step.last_sampled.flatten()
    for i, (slot, sampled, rejected) in enumerate(
        zip(step.slots.tolist(), step.num_sampled.tolist(), step.num_rejected.tolist(), strict=True)
    ):
        first, kept = starts[i], starts[i + 1] - starts[i] - rejected
        anchor = int(last_sampled[slot]) if sampled else -1
        mailbox.rows[i] = int(step.positions[first]), kept, anchor, signed(number)
        mailbox.features[filled : filled + kept] = features[first : first + kept]
        filled += kept
