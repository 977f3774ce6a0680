"""The frozen target's features of the training sequences: computed once, kept while memory lasts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from unmask.models.target import TargetModel
from unmask.training.sequences import Batch, SequenceSet

_SLAB_BYTES = 2**30
"""The most pinned memory asked for at once; its allocator rounds up to powers of two."""


class FeatureCache:
    """Features [T, D * H] by sequence, computed online and kept up to a bound.

    Those of a GPU that are kept in host memory are pinned there: a step copies them without waiting for the device.

    Args:
        target: the frozen target, on the training device.
        sequences: whose features are asked for.
        max_bytes: bound of what is kept; sequences beyond it are recomputed at every visit.
        batch_tokens: padded tokens of one target forward.
        final: append the target's final (normed) states, from which its logits follow: [T, D * H + H].
        device: where features are kept.
    """

    def __init__(
        self,
        target: TargetModel,
        sequences: SequenceSet,
        max_bytes: int,
        batch_tokens: int = 4096,
        *,
        final: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.target, self.sequences = target, sequences
        self.final, self.keep_on = final, torch.device(device)
        self.max_bytes, self.batch_tokens = max_bytes, batch_tokens
        self.kept: dict[int, Tensor] = {}
        self.bytes = 0
        self._rows: Tensor | None = None
        self._starts: dict[int, int] = {}
        """Where the rows of each sequence that is kept begin in `_rows`, if they are kept on the target's device."""
        self._used = 0
        """Rows in use, of `_rows` or of pinned memory."""
        self._slab: Tensor | None = None
        """Pinned rows that are still free."""

    def warm_up(self) -> int:
        """Fill the cache in batches of sequences of like length; returns the number of sequences kept."""
        for indices in self._batches(range(len(self.sequences.sequences))):
            # The shortest come first: after one that has no room none has.
            if self.bytes >= self.max_bytes or not self._keep(indices):
                break
        return len(self.kept)

    def get(self, batch: Batch) -> Tensor:
        """Features of a batch where its tokens are, zero elsewhere, on the target's device: [B, T, F]."""
        missing = [i for i in batch.indices if i not in self.kept]
        if self._rows is not None and not missing:
            return self._gathered(self._rows, batch)
        fresh: dict[int, Tensor] = {}
        for indices in self._batches(missing):
            fresh |= zip(indices, self._compute(indices), strict=True)
        features = [self.kept[i] if i in self.kept else fresh[i] for i in batch.indices]
        return batch.lay_out(features, self.target.device)

    def _gathered(self, rows: Tensor, batch: Batch) -> Tensor:
        """The same by one operation, whatever the number of sequences; row 0 is zero."""
        chosen = torch.zeros(batch.ids_BT.shape, dtype=torch.long)
        for index, (row, start), length in zip(batch.indices, batch.places, batch.lengths, strict=True):
            first = self._starts[index]
            torch.arange(first, first + length, out=chosen[row, start : start + length])
        return rows[self._moved(chosen)]

    def _batches(self, indices: Iterable[int]) -> Iterator[list[int]]:
        """Sequences of like length, the shortest first, as many as one forward takes."""
        lengths, pending = [len(s.ids) for s in self.sequences.sequences], []
        for index in sorted(indices, key=lengths.__getitem__):
            if pending and (len(pending) + 1) * lengths[index] > self.batch_tokens:
                yield pending
                pending = []
            pending.append(index)
        if pending:
            yield pending

    def _keep(self, indices: list[int]) -> bool:
        """Compute them and keep those that fit; False if one did not."""
        for index, features in zip(indices, self._compute(indices), strict=True):
            size = features.numel() * features.element_size()
            if self.bytes + size > self.max_bytes:
                return False
            self.kept[index] = self._stored(index, features)
            self.bytes += size
        return True

    def _stored(self, index: int, features: Tensor) -> Tensor:
        if self.keep_on.type != self.target.device.type:
            place = self._pinned(features) if features.is_cuda else torch.empty_like(features, device=self.keep_on)
            return place.copy_(features)
        if self._rows is None:
            self._rows = features.new_zeros(1 + self._most_rows(features), features.shape[1])
            self._used = 1
        place = self._rows[self._used : self._used + len(features)]
        place.copy_(features)
        self._starts[index] = self._used
        self._used += len(features)
        return place

    def _pinned(self, features: Tensor) -> Tensor:
        """Free rows of pinned memory for them."""
        length, width = features.shape
        if self._slab is None or len(self._slab) < length:
            row_bytes = width * features.element_size()
            left = max(1, (self._most_rows(features) - self._used) * row_bytes)
            slab_bytes = min(_SLAB_BYTES, 2 ** (left.bit_length() - 1))
            self._slab = torch.empty(max(length, slab_bytes // row_bytes), width, dtype=features.dtype, pin_memory=True)
        place, self._slab = self._slab[:length], self._slab[length:]
        self._used += length
        return place

    def _most_rows(self, features: Tensor) -> int:
        """Rows of all sequences, or as many as the bound allows."""
        tokens = sum(len(sequence.ids) for sequence in self.sequences.sequences)
        return min(tokens, self.max_bytes // (features.shape[1] * features.element_size()))

    def _compute(self, indices: list[int]) -> list[Tensor]:
        batch = self.sequences.padded(indices)
        mask = (torch.arange(batch.ids_BT.shape[1]) < torch.tensor(batch.lengths)[:, None]).long()
        ids, mask = (self._moved(tensor) for tensor in (batch.ids_BT, mask))
        features = self.target.features(ids, mask, final=self.final)
        # Cloned row by row: a view would keep the whole padded batch alive.
        return [features[row, :length].clone() for row, length in enumerate(batch.lengths)]

    def _moved(self, tensor: Tensor) -> Tensor:
        """It on the target's device, without waiting for that."""
        pinned = tensor.pin_memory() if self.target.device.type == "cuda" else tensor
        return pinned.to(self.target.device, non_blocking=True)
