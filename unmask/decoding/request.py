"""What is asked of a diffusion decoder, and what it answers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from unmask.denoiser import DecodeState, Denoiser
from unmask.errors import ConfigError, PromptError
from unmask.types import FinishReason, SamplingOptions

S = TypeVar("S", bound=DecodeState)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRequest:
    """One prompt to be completed."""

    request_id: str
    prompt_ids: tuple[int, ...]
    options: SamplingOptions = field(default_factory=SamplingOptions)
    prefix: tuple[int, ...] = ()
    """The beginning of the response, sent by an earlier run that broke off: it is kept and not sent again. Blocks
    stay where that run had them."""

    @property
    def length(self) -> int:
        """Prompt + response columns."""
        return len(self.prompt_ids) + self.options.max_tokens

    @property
    def seed(self) -> int:
        """The seed of its noise: its own, or one derived from its id, so that a retried request is the same."""
        if self.options.seed is not None:
            return self.options.seed % 2**63
        return int.from_bytes(hashlib.blake2b(self.request_id.encode(), digest_size=7).digest(), "little")

    def check(self, denoiser: Denoiser) -> None:
        """Refuse what cannot be decoded.

        Raises:
            PromptError: empty prompt, ids outside of the vocabulary, or the mask id among them (it would be decoded).
            ConfigError: no room for a response, or an option that these decoders do not have.
        """
        ids = self.prompt_ids
        if not ids:
            raise PromptError("the prompt is empty; give at least one token", field="prompt_ids")
        if min(ids) < 0 or max(ids) >= denoiser.vocab_size:
            raise PromptError(f"token ids must lie in [0, {denoiser.vocab_size})", field="prompt_ids")
        if denoiser.mask_id in ids:
            raise PromptError(f"the prompt contains the mask token ({denoiser.mask_id}); remove it", field="prompt_ids")
        if self.options.max_tokens < 1:
            raise ConfigError("must be at least 1", field="max_tokens")
        self._check_prefix(denoiser)
        if self.length > denoiser.max_length:
            room = f"{len(ids)} + {self.options.max_tokens} tokens exceed the model's {denoiser.max_length}"
            raise ConfigError(f"{room}; shorten the prompt or the response", field="max_tokens")
        for name in ("top_k", "presence_penalty", "frequency_penalty", "logprobs", "json_schema"):
            if getattr(self.options, name):
                raise ConfigError("is not supported by diffusion decoders; leave it out", field=name)

    def _check_prefix(self, denoiser: Denoiser) -> None:
        for token in self.prefix:
            if not 0 <= token < denoiser.vocab_size or token == denoiser.mask_id:
                raise PromptError(f"token {token} cannot be part of a response", field="prefix")
        if len(self.prefix) >= self.options.max_tokens:
            raise PromptError("the response is complete already: nothing is left to decode", field="prefix")

    def fresh_state(self, cls: type[S], denoiser: Denoiser, slot: int, **own: Any) -> S:
        """A row at its start: the prompt followed by masks. `own` holds the fields that `cls` adds."""
        if denoiser.mask_id is None:
            raise ConfigError("the network has no mask token: it is a causal LM", field="decoder")
        tokens = np.full(self.length, denoiser.mask_id, dtype=np.int64)
        tokens[: len(self.prompt_ids)] = self.prompt_ids
        return cls(
            request_id=self.request_id,
            slot=slot,
            tokens=tokens,
            prompt_len=len(self.prompt_ids),
            commit_step=np.zeros(self.options.max_tokens, dtype=np.int64),
            mask_id=denoiser.mask_id,
            stop_ids=tuple({*denoiser.eos_ids, *self.options.stop_token_ids}),
            stop_at_eos=not self.options.ignore_eos,
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            seed=self.seed,
            committed=len(self.prompt_ids),
            prefix=np.array(self.prefix, dtype=np.int64),
            **own,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished response and what it took."""

    request_id: str
    response_ids: list[int]
    """Tokens up to and including the first stop id."""
    finish_reason: FinishReason
    num_forwards: int
    """NFE: every denoiser forward spent on the request."""
    forwards_at_eos: int | None
    """NFE when the stop id was committed for good; the rest was spent on padding. None without a stop id."""
    commit_step: list[int]
    """The forward (from 1) that committed each response token."""
    num_text_tokens: int
    """Response tokens before the first stop id."""

    @property
    def tokens_per_forward(self) -> float:
        """TPF: response tokens before the stop id, over NFE."""
        return self.num_text_tokens / max(self.num_forwards, 1)

    @classmethod
    def of(cls, state: DecodeState) -> Completion:
        """What a finished row has to show."""
        response = state.tokens[state.prompt_len : state.committed]
        if state.saw_stop:
            response = until_stop(response, state.stop_ids)
        end = len(response)
        # A row that decodes beyond its end for the sake of a fixed length still says nothing more after it.
        text = until_stop(response, state.stop_ids)
        return cls(
            request_id=state.request_id,
            response_ids=response.tolist(),
            finish_reason=state.finish_reason or "abort",
            num_forwards=state.num_forwards,
            forwards_at_eos=state.forwards_at_eos,
            commit_step=state.commit_step[:end].tolist(),
            num_text_tokens=len(text) - int(len(text) > 0 and text[-1] in state.stop_ids),
        )


def until_stop(tokens: np.ndarray, stop_ids: tuple[int, ...]) -> np.ndarray:
    """The tokens up to and including the first stop id, or all of them."""
    stops = np.flatnonzero(np.isin(tokens, stop_ids))
    return tokens[: stops[0] + 1] if len(stops) else tokens
