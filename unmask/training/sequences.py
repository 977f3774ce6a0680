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

    @property
    def trainable(self) -> bool:
        """Whether it holds an anchor and a label: at least two response tokens."""
        return len(self.ids) - self.prompt_length >= 2


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded sequences: `indices` into the set, ids, and which positions are response."""

    indices: tuple[int, ...]
    ids_BT: Tensor
    response_BT: Tensor
    length_B: Tensor


class SequenceSet:
    """The sequences of one rank, visited in an order that depends on seed and step alone.

    A resumed run therefore sees the batches that the unbroken run would have seen.

    Args:
        sequences: all ranks' sequences, in the same order on each.
        rank: this worker's number; it owns every `world_size`-th sequence, so that cached features stay useful.
        batch_size: sequences a step.
    """

    def __init__(
        self, sequences: Iterable[TokenSequence], *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        usable = [s for s in sequences if s.trainable]
        if len(usable) < world_size * batch_size:
            raise UserError(
                f"only {len(usable)} trajectories have two response tokens or more, "
                f"a step of {world_size} worker(s) takes {world_size * batch_size}; generate more",
                field="distill.sequences_per_step",
            )
        # Every rank keeps the same number, so that all of them take part in every step of an epoch.
        self.sequences = usable[rank : len(usable) - len(usable) % world_size : world_size]
        self.batch_size, self.seed, self.rank = batch_size, seed, rank

    def __len__(self) -> int:
        return len(self.sequences)

    def indices(self, step: int) -> tuple[int, ...]:
        """Which sequences step `step` visits; every sequence once an epoch, a new order each epoch."""
        per_epoch = len(self) // self.batch_size
        epoch, position = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(hash((self.seed, self.rank, epoch)) & 0x7FFFFFFF)
        order = torch.randperm(len(self), generator=generator)
        return tuple(order[position * self.batch_size : (position + 1) * self.batch_size].tolist())

    def batch(self, indices: Sequence[int]) -> Batch:
        """Pad the chosen sequences on the right."""
        chosen = [self.sequences[i] for i in indices]
        length = max(len(s.ids) for s in chosen)
        ids = torch.zeros(len(chosen), length, dtype=torch.long)
        response = torch.zeros(len(chosen), length, dtype=torch.bool)
        for row, sequence in enumerate(chosen):
            ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
            response[row, sequence.prompt_length : len(sequence.ids)] = True
        return Batch(tuple(indices), ids, response, torch.tensor([len(s.ids) for s in chosen]))
