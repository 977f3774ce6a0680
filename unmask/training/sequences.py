"""Training sequences and the order in which they are visited."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
    """Sequences as a batch, each in a row of its own (right-padded) or all packed into one row.

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

    def lay_out(self, rows: Sequence[Tensor]) -> Tensor:
        """Per-sequence rows [length, F] where their tokens are: [B, T, F], zero elsewhere."""
        if not self.packed:
            return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        return F.pad(torch.cat(list(rows)), (0, 0, 0, self.ids_BT.shape[1] - sum(self.lengths)))[None]


class SequenceSet:
    """The sequences of one rank, visited in an order that depends on seed and step alone.

    A resumed run therefore sees the batches that the unbroken run would have seen.

    Args:
        sequences: all ranks' sequences, in the same order on each.
        rank: this worker's number; it owns every `world_size`-th sequence, so that cached features stay useful.
        batch_size: sequences a step.
        tokens_per_step: pack sequences into one row of this many tokens a step, so that steps and ranks are balanced
            by tokens (longer sequences are left out); None pads `batch_size` sequences.
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
        if len(usable) < world_size * batch_size:
            raise UserError(
                f"only {len(usable)} sequences have two response tokens or more (and fit a step), "
                f"a step of {world_size} worker(s) takes {world_size * batch_size}; lower it, or give more",
                field=f"{section}.sequences_per_step",
            )
        # Every rank keeps the same number, so that all of them take part in every step of an epoch.
        self.sequences = usable[rank : len(usable) - len(usable) % world_size : world_size]
        self.batch_size, self.seed, self.rank = batch_size, seed, rank
        self.tokens_per_step = tokens_per_step
        self._packed: list[tuple[int, ...]] = []
        self._packed_epochs = 0

    def __len__(self) -> int:
        return len(self.sequences)

    def indices(self, step: int) -> tuple[int, ...]:
        """Which sequences step `step` visits; every sequence at most once an epoch, a new order each epoch."""
        if self.tokens_per_step is not None:
            while len(self._packed) <= step:
                self._packed += self._pack(self._order(self._packed_epochs), self.tokens_per_step)
                self._packed_epochs += 1
            return self._packed[step]
        per_epoch = len(self) // self.batch_size
        epoch, position = divmod(step, per_epoch)
        return self._order(epoch)[position * self.batch_size : (position + 1) * self.batch_size]

    def _order(self, epoch: int) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.rank, epoch)) & 0x7FFFFFFF)
        return tuple(torch.randperm(len(self), generator=generator).tolist())

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

    def batch(self, indices: Sequence[int]) -> Batch:
        """The chosen sequences as a step trains on them."""
        return self.padded(indices) if self.tokens_per_step is None else self.packed(indices, self.tokens_per_step)

    def padded(self, indices: Sequence[int]) -> Batch:
        """One sequence a row, padded on the right."""
        chosen = [self.sequences[i] for i in indices]
        shape = len(chosen), max(len(s.ids) for s in chosen)
        ids = torch.zeros(shape, dtype=torch.long)
        response = torch.zeros(shape, dtype=torch.bool)
        for row, sequence in enumerate(chosen):
            ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
            response[row, sequence.prompt_length : len(sequence.ids)] = True
        first = _first(chosen, response, range(len(chosen)), [0] * len(chosen))
        lengths = tuple(len(s.ids) for s in chosen)
        return Batch(tuple(indices), ids, response, torch.zeros_like(ids), lengths, first_BT=first)

    def packed(self, indices: Sequence[int], capacity: int) -> Batch:
        """One row of `capacity` columns that holds the sequences one after another."""
        ids = torch.zeros(1, capacity, dtype=torch.long)
        response = torch.zeros(1, capacity, dtype=torch.bool)
        starts = torch.zeros(1, capacity, dtype=torch.long)
        chosen = [self.sequences[i] for i in indices]
        lengths = tuple(len(s.ids) for s in chosen)
        start = 0
        for sequence in chosen:
            end = start + len(sequence.ids)
            ids[0, start:end] = torch.tensor(sequence.ids)
            response[0, start + sequence.prompt_length : end] = True
            starts[0, start:end] = start
            start = end
        starts[0, start:] = start
        first = _first(chosen, response, [0] * len(chosen), [0, *itertools.accumulate(lengths)])
        return Batch(tuple(indices), ids, response, starts, lengths, packed=True, first_BT=first)


def _first(
    chosen: Sequence[TokenSequence], like_BT: Tensor, rows: Sequence[int], starts: Sequence[int]
) -> Tensor | None:
    """The sequences' own anchors where a batch holds them."""
    if not any(sequence.anchors for sequence in chosen):
        return None
    first = torch.zeros_like(like_BT)
    for sequence, row, start in zip(chosen, rows, starts, strict=False):
        first[row, [start + anchor for anchor in sequence.anchors]] = True
    return first
