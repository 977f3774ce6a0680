"""DFlash decoding of one request: the draft proposes a block, the target verifies it (arXiv 2602.06036, Figure 2).

This is the plain loop that serving is checked against: batch 1, one draft pass and one target pass a round.
At any temperature the text is distributed as the target's own, because a draft token is accepted exactly when
the target's own sample at its position equals it, and the first sample that differs is kept as the bonus.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unmask.models.dflash import DFlashDraft
from unmask.models.target import TargetModel, crop
from unmask.objectives.confidence import ConfidenceHead, judged_rows
from unmask.types import SamplingOptions


@dataclass(slots=True)
class SpeculativeResult:
    """A response and what it took."""

    token_ids: list[int] = field(default_factory=list)
    """Emitted tokens, up to and including the first EOS."""
    accepted: list[int] = field(default_factory=list)
    """Accepted drafts of each verification, counted before the response is cut at EOS or length."""
    drafted: list[int] = field(default_factory=list)
    """Proposed drafts of each verification."""
    judged: list[tuple[float, bool]] = field(default_factory=list)
    """With a confidence head: see `judged_rows`, of all verifications."""

    @property
    def acceptance_length(self) -> float:
        """tau: tokens a target verification yields, bonus included (1 + accepted / verifications)."""
        return 1 + sum(self.accepted) / max(len(self.accepted), 1)


class DraftState:
    """The draft's side of one request: context keys and values of positions before the anchor."""

    def __init__(self, draft: DFlashDraft, embedding_VH: Tensor, lm_head_VH: Tensor) -> None:
        self.draft, self.embedding, self.lm_head = draft, embedding_VH, lm_head_VH
        config = draft.config
        shape = (config.num_hidden_layers, 1, 0, config.num_key_value_heads, config.head_dim)
        self.context_k = embedding_VH.new_empty(shape)
        self.context_v = embedding_VH.new_empty(shape)

    @property
    def num_context(self) -> int:
        """Rows of context held: positions 0 .. num_context - 1."""
        return self.context_k.shape[2]

    def append(self, features_TD: Tensor) -> None:
        """Take in the target's features [T, D * H] of the next T positions."""
        context = self.draft.project_features(features_TD)
        positions = torch.arange(self.num_context, self.num_context + len(context), device=context.device)
        keys, values = self.draft.context_kv(context[None], positions[None])
        self.context_k = torch.cat([self.context_k, keys], dim=2)
        self.context_v = torch.cat([self.context_v, values], dim=2)

    def block_logits(self, anchor: int, num_tokens: int) -> Tensor:
        """Logits [K, V] of the K masked positions after the anchor, from one pass over [anchor, mask x K]."""
        return self.logits(self.block_states(anchor, num_tokens))

    def logits(self, states_KH: Tensor) -> Tensor:
        """Logits [K, V] of final states."""
        return states_KH @ self.lm_head.T

    def block_states(self, anchor: int, num_tokens: int) -> Tensor:
        """Final states [K, H] of the same positions."""
        ids = [anchor] + [self.draft.config.mask_token_id] * num_tokens
        block = self.embedding[torch.tensor(ids, device=self.embedding.device)]
        positions = torch.arange(self.num_context, self.num_context + len(ids), device=block.device)
        lens = torch.tensor([self.num_context], device=block.device)
        hidden = self.draft.denoise(block[None], positions[None], self.context_k, self.context_v, lens)
        return hidden[0, 1:]


@torch.inference_mode()
def speculative_decode(
    target: TargetModel,
    draft: DFlashDraft | None,
    prompt_ids: list[int],
    options: SamplingOptions,
    *,
    num_speculative_tokens: int,
    eos_ids: frozenset[int],
    generator: torch.Generator | None = None,
    confidence: ConfidenceHead | None = None,
) -> SpeculativeResult:
    """Generate one response.

    Args:
        target: the verifier; its features condition the draft.
        draft: the proposer; None decodes with the target alone (every round yields one token).
        prompt_ids: prompt tokens.
        options: `max_tokens`, `temperature`, `top_p`, `top_k`, `ignore_eos` are honoured.
        num_speculative_tokens: K, at most the draft's block size - 1.
        eos_ids: tokens that end a response.
        generator: needed above temperature 0.
        confidence: the draft's; it is heard, and changes nothing.

    Returns:
        The response with its acceptance counts.
    """
    result = SpeculativeResult()
    stops = frozenset() if options.ignore_eos else eos_ids
    cache = target.new_cache()
    prompt = torch.tensor([prompt_ids], device=target.device)
    logits, features = target.forward(prompt, cache)
    anchor = int(sample(logits[0, -1:], options, generator))
    state = DraftState(draft, target.embedding, target.lm_head) if draft is not None else None
    finished = _emit(result, [anchor], stops, options.max_tokens)
    pending = features[0]
    while not finished:
        proposal: list[int] = []
        chances: list[float] = []
        if state is not None:
            state.append(pending)
            states = state.block_states(anchor, num_speculative_tokens)
            proposal = state.logits(states).argmax(-1).tolist()
            chances = confidence(states[None])[0].sigmoid().tolist() if confidence is not None else []
        block = torch.tensor([[anchor, *proposal]], device=target.device)
        logits, features = target.forward(block, cache)
        samples = sample(logits[0], options, generator).tolist()
        accepted = longest_match(proposal, samples)
        crop(cache, len(proposal) - accepted)
        if state is not None:
            result.accepted.append(accepted)
            result.drafted.append(len(proposal))
        # Rows of the anchor and of accepted drafts; the bonus has not been through the target yet.
        pending = features[0, : accepted + 1]
        anchor = samples[accepted]
        before = len(result.token_ids)
        finished = _emit(result, samples[: accepted + 1], stops, options.max_tokens)
        result.judged += judged_rows(chances, accepted, len(result.token_ids) - before)
    return result


def longest_match(proposal: list[int], samples: list[int]) -> int:
    """Length of the longest prefix of the proposal that the target's own samples agree with."""
    accepted = 0
    while accepted < min(len(proposal), len(samples)) and proposal[accepted] == samples[accepted]:
        accepted += 1
    return accepted


def sample(logits_TV: Tensor, options: SamplingOptions, generator: torch.Generator | None) -> Tensor:
    """One token a row (int64 [T]): argmax at temperature 0, else a draw after temperature, top-k and top-p."""
    if options.temperature == 0:
        return logits_TV.argmax(-1)
    logits = logits_TV.float() / options.temperature
    if options.top_k:
        kth = logits.topk(options.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if options.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # A token stays while the mass before it is below top_p; the first always stays.
        outside = probabilities.cumsum(-1) - probabilities >= options.top_p
        logits = logits.scatter(-1, order, ordered.masked_fill(outside, float("-inf")))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _emit(result: SpeculativeResult, tokens: list[int], stops: frozenset[int], max_tokens: int) -> bool:
    """Append tokens up to EOS or the length limit; True when the response has ended."""
    for token in tokens:
        result.token_ids.append(token)
        if token in stops or len(result.token_ids) >= max_tokens:
            return True
    return False
