"""The vocabulary of diffusion decoding: who may look at whom, what predicts tokens, and how far a row has come.

Columns. A row's columns are numbered from 0; the prompt holds columns [0, P), the response [P, L). In a cached
forward a column is the token's position, so keys and values have one fixed place and a window of columns can be
fed, fed again or overwritten without any bookkeeping. In an uncached forward the columns are the input's own.

Dimension letters: B rows, T fed columns, S key columns, K read columns, V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch

from unmask.types import FinishReason

if TYPE_CHECKING:
    from unmask.models.cache import CacheView, KVCache

Attention = Literal["bidirectional", "block_causal", "causal"]


class MaskSpec(Protocol):
    """An attention mask as one predicate, from which the dense and the flex form are both derived."""

    def allow(self, row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """True where column `query` of `row` may see column `key`; integer tensors that broadcast together."""
        ...


class Denoiser(Protocol):
    """A network that predicts the token of any column: what every decoder is given."""

    @property
    def vocab_size(self) -> int:
        """V: ids are below it."""
        ...

    @property
    def mask_id(self) -> int | None:
        """The id of a masked column; None for a plain causal LM."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a response."""
        ...

    @property
    def max_length(self) -> int:
        """Longest prompt + response, in tokens."""
        ...

    @property
    def attention(self) -> Attention:
        """The attention that the weights were trained with."""
        ...

    @property
    def block_size(self) -> int | None:
        """The trained block of a block-causal network."""
        ...

    @property
    def device(self) -> torch.device:
        """Where batches are sent."""
        ...

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        *,
        mask: MaskSpec,
        cache: CacheView | None = None,
        logits_at: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits that predict the tokens of the columns `logits_at`.

        Args:
            ids: int64 [B, T], fed tokens.
            positions: int64 [B, T], absolute positions (with a cache: also the columns that are written).
            mask: who may look at whom.
            cache: rows of a KVCache to extend and to attend to, or None for a forward on its own.
            logits_at: int64 [B, K] columns, or bool [B, T] marking them, or None for the raw row of every
                fed column, unaligned.

        Returns:
            [B, K, V], or [N, V] in row-major order for a bool `logits_at`, or [B, T, V].
        """
        ...

    def new_cache(self, num_rows: int, capacity: int) -> KVCache:
        """Room for `num_rows` rows of `capacity` columns, on the network's device and in its dtype."""
        ...


@dataclass(slots=True, kw_only=True)
class DecodeState:
    """What the host knows of one request while it is decoded. Decoders add their own fields by inheritance."""

    request_id: str
    slot: int
    """Its row in every cache."""
    tokens: np.ndarray
    """int64 [L]: the prompt, then committed tokens, with the mask id where nothing is committed yet."""
    prompt_len: int
    commit_step: np.ndarray
    """int64 [L - P]: the forward (from 1) that committed each response column; 0 while it is masked."""
    mask_id: int
    stop_ids: tuple[int, ...]
    stop_at_eos: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    committed: int = 0
    """Columns [0, committed) are final and contiguous: they may be sent."""
    cached: int = 0
    """Columns [0, cached) of the row's cache stay valid for the next forward."""
    num_forwards: int = 0
    forwards_at_eos: int | None = None
    """`num_forwards` when the first stop id became part of the committed columns."""
    finish_reason: FinishReason | None = None
    prefix: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """int64: the first response tokens, where they are known from an earlier run; whatever is committed there takes
    these values."""

    @property
    def length(self) -> int:
        """L: prompt + response columns."""
        return len(self.tokens)

    def is_masked(self, start: int, stop: int) -> bool:
        """Whether any column of [start, stop) still waits for its token."""
        return bool((self.tokens[start:stop] == self.mask_id).any())

    def has_stop(self, start: int, stop: int) -> bool:
        """Whether a stop id has been committed in [start, stop)."""
        segment = self.tokens[start:stop]
        return any((segment == token).any() for token in self.stop_ids)

    def record(self, start: int, tokens: np.ndarray) -> None:
        """Take over the tokens that one forward left in the columns from `start` on."""
        stop = start + len(tokens)
        known = self.prefix[start - self.prompt_len : stop - self.prompt_len]
        if len(known):
            own = tokens[: len(known)]
            tokens = np.concatenate((np.where(own == self.mask_id, own, known), tokens[len(known) :]))
        fresh = (self.tokens[start:stop] == self.mask_id) & (tokens != self.mask_id)
        self.num_forwards += 1
        self.commit_step[start - self.prompt_len : stop - self.prompt_len][fresh] = self.num_forwards
        self.tokens[start:stop] = tokens

    def commit_to(self, column: int) -> None:
        """Declare the columns before `column` final; the first stop id among them is noted."""
        if column == self.committed:
            return
        if self.forwards_at_eos is None and self.has_stop(max(self.committed, self.prompt_len), column):
            self.forwards_at_eos = self.num_forwards
        self.committed = column

    @property
    def saw_stop(self) -> bool:
        """Whether the committed columns hold a stop id and the request wants to end there."""
        return self.stop_at_eos and self.forwards_at_eos is not None
