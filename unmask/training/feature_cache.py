"""The frozen target's features of the training sequences: computed once, kept while memory lasts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from unmask.models.target import TargetModel
from unmask.training.sequences import Batch, SequenceSet


class FeatureCache:
    """Features [T, D * H] by sequence, computed online and kept up to a bound.

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
        return batch.lay_out(features).to(self.target.device, non_blocking=True)

    def _gathered(self, rows: Tensor, batch: Batch) -> Tensor:
        """The same by one operation, whatever the number of sequences; row 0 is zero."""
        chosen = torch.zeros(batch.ids_BT.shape, dtype=torch.long)
        for index, (row, start), length in zip(batch.indices, batch.places, batch.lengths, strict=True):
            first = self._starts[index]
            torch.arange(first, first + length, out=chosen[row, start : start + length])
        if rows.is_cuda:
            chosen = chosen.pin_memory()
        return rows[chosen.to(rows.device, non_blocking=True)]

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
            return features.to(self.keep_on)
        if self._rows is None:
            most = self.max_bytes // (features.shape[1] * features.element_size())
            tokens = sum(len(sequence.ids) for sequence in self.sequences.sequences)
            self._rows = features.new_zeros(1 + min(tokens, most), features.shape[1])
            self._used = 1
        place = self._rows[self._used : self._used + len(features)]
        place.copy_(features)
        self._starts[index] = self._used
        self._used += len(features)
        return place

    def _compute(self, indices: list[int]) -> list[Tensor]:
        batch = self.sequences.padded(indices)
        ids = batch.ids_BT.to(self.target.device)
        mask = torch.arange(ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
        features = self.target.features(ids, mask.to(ids.device).long(), final=self.final)
        # Cloned row by row: a view would keep the whole padded batch alive.
        return [features[row, :length].clone() for row, length in enumerate(batch.lengths)]
