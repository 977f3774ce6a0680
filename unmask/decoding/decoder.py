"""What every diffusion decoder is: a plan on the host, a pure step on the device, a transition on the host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Generic, TypeVar

import numpy as np
import torch

from unmask.decoding.batch import Batch, Window
from unmask.decoding.logits import Logits
from unmask.decoding.request import DecodeRequest
from unmask.denoiser import Attention, DecodeState, Denoiser, MaskSpec
from unmask.errors import ConfigError
from unmask.models.cache import CacheView, KVCache

S = TypeVar("S", bound=DecodeState)
Caches = Mapping[Denoiser, KVCache]


class Decoder(ABC, Generic[S]):
    """An algorithm over an injected denoiser. It holds no per-request state, so any rows may share a step.

    One forward of a row is `window` (host: what to feed and read), `step` (device: forward, choose, commit) and
    `advance` (host: take the tokens over, move on). `step` sees many rows at once and treats each as if it were
    alone; it never synchronises.
    """

    denoiser: Denoiser
    cached_models: tuple[Denoiser, ...] = ()
    """The networks that need a KV cache; none for a decoder that feeds whole rows."""
    open_multiple: int | None = None
    """Read columns come in multiples of this; None leaves it to the loop."""

    @property
    @abstractmethod
    def max_open(self) -> int:
        """Most columns that one forward of a row reads."""

    @abstractmethod
    def admit(self, request: DecodeRequest, slot: int) -> S:
        """A fresh row. Raises PromptError or ConfigError for a request that cannot be decoded."""

    @abstractmethod
    def window(self, state: S) -> Window:
        """What the row's next forward feeds and reads."""

    @abstractmethod
    def step(self, batch: Batch, caches: Caches) -> torch.Tensor:
        """Run one forward and commit tokens: int64 [B, K], the read columns as they are now."""

    @abstractmethod
    def update(self, state: S, window: Window) -> None:
        """Move a row on after its tokens have been recorded: blocks, cache length, committed columns, the end."""

    def advance(self, state: S, window: Window, tokens: np.ndarray) -> None:
        """Take over what a step left in the row's read columns."""
        state.record(window.open_start, tokens)
        self.update(state, window)

    def view(self, model: Denoiser, batch: Batch, caches: Caches) -> CacheView | None:
        """The batch's rows in the cache of `model`; None where this decoder runs it without one."""
        if model not in self.cached_models:
            return None
        return caches[model].select(batch.rows_B, batch.shape.num_keys, leading=batch.shape.leading)

    def denoise(self, batch: Batch, mask: MaskSpec, caches: Caches) -> Logits:
        """One forward of the denoiser: the logits of the read columns, the mask token forbidden."""
        cache = self.view(self.denoiser, batch, caches)
        logits = self.denoiser(batch.ids_BT, batch.columns_BT, mask=mask, cache=cache, logits_at=batch.open_columns_BK)
        return Logits(logits, self.denoiser.mask_id)


def require_attention(denoiser: Denoiser, attention: Attention, name: str) -> None:
    """Refuse a network trained with another attention: its text would be noise. Raises ConfigError."""
    if denoiser.attention != attention:
        found = f"{name} needs a {attention} network, this one is {denoiser.attention}"
        raise ConfigError(f"{found}; choose another decoder or checkpoint", field="decoder")


def require(condition: bool, field: str, message: str) -> None:
    """Refuse an impossible decoder setting. Raises ConfigError."""
    if not condition:
        raise ConfigError(message, field=f"decoder.{field}")
