"""The logits of the read columns, as decoders ask for them: on a GPU one pass over the vocabulary answers all.

Everything is float32, row-wise and free of synchronisation. Dimension letters: B rows, K read columns, V vocabulary.
"""

from __future__ import annotations

from functools import cached_property

import torch


class Logits:
    """Logits [B, K, V] with one token forbidden: a mask token that is committed would never be denoised.

    Args:
        raw_BKV: in any dtype; not changed.
        forbidden: has probability 0; None or an id beyond V forbids nothing.
    """

    def __init__(self, raw_BKV: torch.Tensor, forbidden: int | None) -> None:
        self._raw = raw_BKV
        self._forbidden = forbidden if forbidden is not None and forbidden < raw_BKV.shape[-1] else None

    @cached_property
    def values_BKV(self) -> torch.Tensor:
        """The logits in float32, -inf where they are forbidden."""
        values = self._raw.to(torch.float32, copy=True)
        if self._forbidden is not None:
            values[..., self._forbidden] = -torch.inf
        return values

    @property
    def best_BK(self) -> torch.Tensor:
        """The likeliest token, int64."""
        return self._digest[0]

    @property
    def entropy_BK(self) -> torch.Tensor:
        """Entropy of the softmax in nats."""
        return self._digest[2]

    def probability(self, tokens_BK: torch.Tensor) -> torch.Tensor:
        """softmax(z)[token], float32 [B, K]: the model's own confidence, whatever the sampling temperature."""
        chosen = self._raw.gather(-1, tokens_BK[:, :, None])[:, :, 0]
        return (chosen.float() - self._digest[1]).exp()

    @property
    def margin_BK(self) -> torch.Tensor:
        """Probability of the likeliest token minus that of the second."""
        best = self.values_BKV.topk(2, dim=-1).values
        likeliest, second = (best - self._digest[1][:, :, None]).exp().unbind(-1)
        return likeliest - second

    @cached_property
    def _digest(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Likeliest token, log of the sum of exponentials, and entropy, each [B, K]."""
        if self._raw.is_cuda:
            from unmask.decoding.logits_triton import digest

            return digest(self._raw, self._forbidden)
        return digest_reference(self.values_BKV)


def digest_reference(values_BKV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reference of the kernel: likeliest token, log of the sum of exponentials, entropy."""
    logsumexp = values_BKV.logsumexp(-1)
    entropy = torch.special.entr(values_BKV.softmax(-1)).sum(-1)
    return values_BKV.argmax(-1), logsumexp, entropy
