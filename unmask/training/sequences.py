"""Training sequences and the order in which they are visited."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.errors import UserError


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt and its response as one sequence of ids."""

    ids: tuple[int, ...]
    prompt_length: int
    anchors: tuple[int, ...] = ()
    """Columns to begin blocks at before all others: where a served draft was rejected."""

    @property
    def trainable(self) -> bool:
        """Whether it holds an anchor and a label: at least two response tokens."""
        return len(self.ids) - self.prompt_length >= 2


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences as a batch, each in a row of its own (right-padded) or several packed into a row.

    `indices` are those of the set, `lengths` theirs; `response_BT` says which columns are response tokens, and
    `starts_BT` in which column the sequence of a column begins.
    """

    indices: tuple[int, ...]
    ids_BT: Tensor
    response_BT: Tensor
    starts_BT: Tensor
    lengths: tuple[int, ...]
    packed: bool = False
    first_BT: Tensor | None = None
    """Columns that are drawn as anchors before all others; None if there are none."""

    places: tuple[tuple[int, int], ...] = ()
    """Row and first column of each sequence."""

    def lay_out(self, states: Sequence[Tensor], device: torch.device) -> Tensor:
        """Per-sequence states [length, F], wherever they are, where their tokens are: [B, T, F] on `device`, zero
        elsewhere. Pinned ones are copied without waiting for the device."""
        laid = states[0].new_zeros(*self.ids_BT.shape, states[0].shape[-1], device=device)
        for of_sequence, (row, start) in zip(states, self.places, strict=True):
            laid[row, start : start + len(of_sequence)].copy_(of_sequence, non_blocking=True)
        return laid


class SequenceSet:
    """The sequences of one rank, visited in an order that does not depend on how many ranks there are.

    A step has `batch_size` rows. Each row has sequences of its own, every `batch_size`-th of the set, and visits each
    once an epoch, in an order that follows from (seed, row, epoch). A rank fills every `world_size`-th row. So a run
    that is resumed, on as many ranks or on others, trains on the batches of the unbroken run, and a rank meets the same
    sequences again, whose features it keeps.

    Args:
        sequences: all ranks' sequences, in the same order on each.
        batch_size: rows of a step, of all ranks together.
        rank: this worker's number.
        tokens_per_step: pack sequences into rows of this many tokens, so that steps and ranks are balanced by tokens
            (longer sequences are left out); None gives a row one sequence, and pads.
        section: of the recipe, for the error.
    """

    def __init__(
        self,
        sequences: Iterable[TokenSequence],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        tokens_per_step: int | None = None,
        section: str = "distill",
    ) -> None:
        usable = [s for s in sequences if s.trainable and len(s.ids) <= (tokens_per_step or len(s.ids))]
        if not world_size <= batch_size <= len(usable):
            raise UserError(
                f"only {len(usable)} sequences have two response tokens or more (and fit a step), a step takes "
                f"{batch_size}, and each of {world_size} worker(s) needs one; change it, or give more",
                field=f"{section}.sequences_per_step" if tokens_per_step is None else f"{section}.rows_per_step",
            )
        self.batch_size, self.seed, self.rank = batch_size, seed, rank
        self.tokens_per_step, self.total = tokens_per_step, len(usable)
        self.row_numbers = range(rank, batch_size, world_size)
        self.sequences: list[TokenSequence] = []
        self._owned: dict[int, range] = {}
        for number in self.row_numbers:
            owned = usable[number::batch_size]
            self._owned[number] = range(len(self.sequences), len(self.sequences) + len(owned))
            self.sequences += owned
        self._ids = [torch.tensor(sequence.ids) for sequence in self.sequences]
        self._orders: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._packed: dict[int, list[tuple[int, ...]]] = {number: [] for number in self.row_numbers}
        self._packed_epochs = dict.fromkeys(self.row_numbers, 0)

    def reorder(self, seed: int) -> None:
        """Begin again in the order of another seed."""
        self.seed = seed
        self._orders.clear()
        self._packed = {number: [] for number in self.row_numbers}
        self._packed_epochs = dict.fromkeys(self.row_numbers, 0)

    def __len__(self) -> int:
        return len(self.sequences)

    def rows(self, step: int) -> tuple[tuple[int, ...], ...]:
        """Which of `sequences` each row of this rank holds in step `step`, in the order of `row_numbers`."""
        return tuple(self._row(number, step) for number in self.row_numbers)

    def _row(self, number: int, step: int) -> tuple[int, ...]:
        if self.tokens_per_step is None:
            epoch, position = divmod(step, len(self._owned[number]))
            return (self._order(number, epoch)[position],)
        packed = self._packed[number]
        while len(packed) <= step:
            packed += self._pack(self._order(number, self._packed_epochs[number]), self.tokens_per_step)
            self._packed_epochs[number] += 1
        return packed[step]

    def _order(self, number: int, epoch: int) -> tuple[int, ...]:
        known, order = self._orders.get(number, (-1, ()))
        if known != epoch:
            owned = self._owned[number]
            generator = torch.Generator().manual_seed(hash((self.seed, number, epoch)) & 0x7FFFFFFF)
            order = tuple(owned[i] for i in torch.randperm(len(owned), generator=generator).tolist())
            self._orders[number] = epoch, order
        return order

    def _pack(self, order: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
        """Consecutive sequences in rows of at most `capacity` tokens."""
        rows: list[list[int]] = [[]]
        used = 0
        for index in order:
            length = len(self.sequences[index].ids)
            if used + length > capacity:
                rows.append([])
                used = 0
            rows[-1].append(index)
            used += length
        return [tuple(row) for row in rows]

    def batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        """The chosen rows as a step trains on them."""
        return self._fill(rows, self.tokens_per_step)

    def padded(self, indices: Sequence[int]) -> Batch:
        """One sequence a row, padded on the right."""
        return self._fill([(index,) for index in indices], None)

    def _fill(self, rows: Sequence[Sequence[int]], capacity: int | None) -> Batch:
        """Sequences one after another in rows of `capacity` columns, or of the longest row's."""
        indices = tuple(index for row in rows for index in row)
        chosen = [self.sequences[index] for index in indices]
        columns = capacity or max(sum(len(self.sequences[index].ids) for index in row) for row in rows)
        ids = torch.zeros(len(rows), columns, dtype=torch.long)
        response = torch.zeros_like(ids, dtype=torch.bool)
        starts, first = torch.zeros_like(ids), torch.zeros_like(response)
        places: list[tuple[int, int]] = []
        for number, row in enumerate(rows):
            start = 0
            for index in row:
                sequence = self.sequences[index]
                end = start + len(sequence.ids)
                ids[number, start:end] = self._ids[index]
                response[number, start + sequence.prompt_length : end] = True
                if sequence.anchors:
                    first[number, [start + anchor for anchor in sequence.anchors]] = True
                starts[number, start:] = start
                places.append((number, start))
                start = end
            starts[number, start:] = start
        return Batch(
            indices=indices,
            ids_BT=ids,
            response_BT=response,
            starts_BT=starts,
            lengths=tuple(len(sequence.ids) for sequence in chosen),
            packed=capacity is not None,
            first_BT=first if any(sequence.anchors for sequence in chosen) else None,
            places=tuple(places),
        )
