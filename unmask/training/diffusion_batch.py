"""Batches for training diffusion LMs: responses are filled up with EOS to the length that decoders are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.training.sequences import TokenSequence


@dataclass(frozen=True, slots=True)
class DiffusionBatch:
    """Rows of prompt, response, EOS padding that is learned, then dead columns."""

    ids_BT: Tensor
    prompt_lens_B: Tensor
    text_lens_B: Tensor
    """Prompt + response, its EOS included."""
    lengths_B: Tensor
    """Prompt + response + padding: the columns that exist for the network."""

    @property
    def positions_BT(self) -> Tensor:
        """Absolute positions, int64 [B, T]."""
        return torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device).expand(self.ids_BT.shape)

    def is_padding(self) -> Tensor:
        """bool [B, T]: columns after a row's text."""
        return self.positions_BT >= self.text_lens_B[:, None]


def fitting(sequences: Iterable[TokenSequence], response_length: int, eos_id: int) -> list[TokenSequence]:
    """The sequences whose response fits, each ended by EOS unless it is already or was cut at that very length."""
    kept = []
    for sequence in sequences:
        room = response_length - (len(sequence.ids) - sequence.prompt_length)
        if room >= 0:
            ended = room == 0 or sequence.ids[-1] == eos_id
            kept.append(sequence if ended else TokenSequence((*sequence.ids, eos_id), sequence.prompt_length))
    return kept


def diffusion_batch(
    sequences: Sequence[TokenSequence],
    response_length: int,
    eos_id: int,
    num_columns: int,
    device: torch.device | str = "cpu",
) -> DiffusionBatch:
    """Pad sequences that are `fitting` into one batch of `num_columns` columns."""
    ids = torch.full((len(sequences), num_columns), eos_id)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
    prompt_lens = torch.tensor([s.prompt_length for s in sequences])
    text_lens = torch.tensor([len(s.ids) for s in sequences])
    host = (ids, prompt_lens, text_lens, prompt_lens + response_length)
    return DiffusionBatch(*(t.to(device, non_blocking=True) for t in host))
