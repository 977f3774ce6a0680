"""Adaptive parallel decoding (APD, arXiv 2506.00413, algorithm 1): a diffusion LM drafts, a small causal LM checks.

The diffusion LM proposes all next tokens from its marginals; the verifier scores them jointly in one forward. What a
mixture of both would have sampled, with the same noise, is kept: the longest agreeing prefix, at least one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from unmask.decoding.batch import Batch, Window
from unmask.decoding.decoder import Caches, Decoder, require, require_attention
from unmask.decoding.logits import Logits
from unmask.decoding.request import DecodeRequest
from unmask.decoding.selection import Sampling, nucleus, row_noise, tempered
from unmask.denoiser import DecodeState, Denoiser
from unmask.masking.attention import Causal, Full


@dataclass(frozen=True, slots=True, kw_only=True)
class APDConfig:
    """The paper's presets: quality is R 0.6, W 32, M 200; fast is R 0.7, W 16, M 100."""

    mixture_weight: float = 0.6
    """R: weight of the diffusion LM in the mixture. Higher is faster and worse."""
    kv_window: int | None = 32
    """W: accepted tokens whose keys and values are recomputed; older ones stay as they were. None caches nothing."""
    max_lookahead: int = 200
    """M: masked columns that are fed and drafted."""
    compat: Literal["paper", "released"] = "paper"
    """`released` accepts against the greedy token of the mixed raw logits and applies the temperature twice to the
    draft, as the authors' code does. At temperature 0 both are the same."""

    def __post_init__(self) -> None:
        require(0 <= self.mixture_weight <= 1, "mixture_weight", "must be in [0, 1]")
        require(self.kv_window is None or self.kv_window >= 1, "kv_window", "must be at least 1, or null for no cache")
        require(self.max_lookahead >= 1, "max_lookahead", "must be at least 1")


@dataclass(slots=True, kw_only=True)
class AdaptiveState(DecodeState):
    """A row; its first masked column t is `committed`."""

    accepted: int = 0
    """k of the last step."""


class APD(Decoder[AdaptiveState]):
    """Algorithm 1 over two networks with one vocabulary."""

    def __init__(self, denoiser: Denoiser, verifier: Denoiser, config: APDConfig) -> None:
        require_attention(denoiser, "bidirectional", "APD")
        require_attention(verifier, "causal", "APD's verifier")
        self.denoiser = denoiser
        self.verifier = verifier
        self.config = config
        self.cached_models = () if config.kv_window is None else (denoiser, verifier)
        self.shared_vocab = min(denoiser.vocab_size, verifier.vocab_size)

    @property
    def max_open(self) -> int:
        """See Decoder."""
        return self.config.max_lookahead

    def admit(self, request: DecodeRequest, slot: int) -> AdaptiveState:
        """See Decoder."""
        request.check(self.denoiser)
        fits = max(request.prompt_ids) < self.shared_vocab and request.length <= self.verifier.max_length
        require(fits, "verifier", "the verifier has too small a vocabulary or context for this request")
        return request.fresh_state(AdaptiveState, self.denoiser, slot)

    def window(self, state: AdaptiveState) -> Window:
        """The last accepted tokens (W of them and those of the last step, less one) and up to M masks."""
        t = state.committed
        stop = min(t + self.config.max_lookahead, state.length)
        width = self.config.kv_window
        start = 0 if width is None or state.cached == 0 else max(t - width - state.accepted + 1, 0)
        return Window(start=start, stop=stop, open_start=t, open_stop=stop, visible=stop)

    def step(self, batch: Batch, caches: Caches) -> torch.Tensor:
        """One step of algorithm 1 for every row."""
        z_d = self.denoise(batch, Full(batch.visible_B), caches).values_BKV[..., : self.shared_vocab]  # 1
        if batch.sampling is None:
            x, y = self._greedy(z_d, batch, caches)
        else:
            x, y = self._sampled(z_d, batch, batch.sampling, caches)
        agree = x == y  # 6
        agree[:, 0] = True
        accepted = agree.long().cumprod(1).bool() & batch.is_open_BK
        return torch.where(accepted, x, batch.open_ids_BK)  # 7

    def update(self, state: AdaptiveState, window: Window) -> None:
        """Move t past the accepted tokens; end at a stop id among them or at the last column."""
        open_tokens = state.tokens[window.open_start : window.open_stop]
        state.accepted = int((open_tokens != state.mask_id).sum())
        state.commit_to(window.open_start + state.accepted)
        state.cached = state.committed if self.cached_models else 0
        if state.saw_stop or state.committed == state.length:
            state.finish_reason = "stop" if state.saw_stop else "length"

    def _greedy(self, z_d: torch.Tensor, batch: Batch, caches: Caches) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft and mixture token at temperature 0."""
        x = z_d.argmax(-1)
        return x, self._mix(z_d, self._verify(batch, x, caches)).argmax(-1)

    def _sampled(
        self, z_d: torch.Tensor, batch: Batch, sampling: Sampling, caches: Caches
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft and mixture token with one and the same noise, so that they agree as often as can be."""
        r = row_noise(sampling, batch.open_columns_BK, self.shared_vocab)
        log_p_d = nucleus(tempered(z_d, sampling), sampling)
        released = self.config.compat == "released"
        x = (log_p_d + (r * sampling.temperature_B[:, None, None] if released else r)).argmax(-1)  # 2
        z_a = self._verify(batch, x, caches)  # 3
        if released:
            return x, self._mix(z_d, z_a).argmax(-1)
        return x, (self._mix(log_p_d, tempered(z_a, sampling)) + r).argmax(-1)  # 4, 5

    def _verify(self, batch: Batch, x: torch.Tensor, caches: Caches) -> torch.Tensor:
        """The verifier's logits [B, K, V] of the drafted columns, each given the draft before it.

        It is fed the diffusion LM's window with the draft filled in; recomputing a causal network's accepted columns
        gives what it gave before.
        """
        inside_BK = batch.is_open_BK.long()  # padding adds 0 to column 0
        place_BK = (batch.open_columns_BK - batch.starts_B[:, None]) * inside_BK
        delta_BK = (x - batch.open_ids_BK) * inside_BK
        logits = self.verifier(
            batch.ids_BT.scatter_add(1, place_BK, delta_BK),
            batch.columns_BT,
            mask=Causal(),
            cache=self.view(self.verifier, batch, caches),
            logits_at=batch.open_columns_BK,
        )
        return Logits(logits[..., : self.shared_vocab], self.denoiser.mask_id).values_BKV

    def _mix(self, diffusion: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
        """R * diffusion + (1 - R) * causal; the pure ends avoid 0 * inf."""
        weight = self.config.mixture_weight
        if weight in (0.0, 1.0):
            return diffusion if weight else causal
        return weight * diffusion + (1 - weight) * causal
