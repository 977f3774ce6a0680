"""Slow, obvious decoders: one row at a time, Python loops over columns, whole-row forwards.

They follow the released codes' loops, with the corrections that docs/algorithms.md lists. What is approximate by
design (caches of bidirectional networks) is mirrored by `StaleRow`, a plain key-value store without any batching.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.diffusion_tools import EOS, MASK, VOCAB, block_causal, causal, everything, predictions
from unmask.decoding.noise import gumbel_noise
from unmask.models.transformer import DiffusionLM

Rule = Callable[[torch.Tensor, list[int]], list[int]]
"""(z [T, V], open columns) -> columns to commit."""


@dataclass
class Decoded:
    """A decoded row: prompt and response."""

    tokens: list[int]
    prompt_len: int
    num_forwards: int = 0

    @property
    def response(self) -> list[int]:
        """Tokens up to and including the first EOS."""
        response = self.tokens[self.prompt_len :]
        return response[: response.index(EOS) + 1] if EOS in response else response


class StaleRow:
    """Keys and values of one row, replaced column by column; every fed column sees all columns below a limit."""

    def __init__(self, network: DiffusionLM) -> None:
        self.network = network
        self.stored: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.rows: dict[int, torch.Tensor] = {}

    @torch.inference_mode()
    def predictions(self, tokens: list[int], start: int, stop: int, visible: int) -> torch.Tensor:
        """Feed columns [start, stop); z [T, V] from the newest row of every column fed so far."""
        x = self.network.model.embed_tokens(torch.tensor([tokens[start:stop]]))
        rope = self.network.model.rotary(torch.arange(start, stop)[None], x.dtype)
        for index, layer in enumerate(self.network.model.layers):
            x = layer(x, rope, lambda _, q, k, v, index=index: self._attend(index, q, k, v, start, visible))
        for offset, row in enumerate(self.network.project(self.network.model.norm(x))[0]):
            self.rows[start + offset] = row
        shift = int(self.network.config.shift)
        z = torch.full((len(tokens), VOCAB), torch.nan)
        for column in range(shift, len(tokens)):
            if column - shift in self.rows:
                z[column] = self.rows[column - shift]
        z[:, MASK] = -torch.inf
        return z

    def _attend(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, visible: int
    ) -> torch.Tensor:
        for offset in range(k.shape[1]):
            self.stored[index, start + offset] = (k[0, offset], v[0, offset])
        keys = torch.stack([self.stored[index, column][0] for column in range(visible)])
        values = torch.stack([self.stored[index, column][1] for column in range(visible)])
        groups = q.shape[2] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[0], keys) / math.sqrt(q.shape[-1])
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)[None]


def semi_autoregressive(
    network: DiffusionLM,
    prompt: list[int],
    max_tokens: int,
    block_size: int,
    rule: Rule,
    *,
    cache: str = "none",
    stop_at_eos: bool = True,
) -> Decoded:
    """LLaDA's loop: block after block, commit what the rule says, one forward a step."""
    decoded = Decoded(prompt + [MASK] * max_tokens, len(prompt))
    x, length = decoded.tokens, len(prompt) + max_tokens
    row = StaleRow(network)
    for start in range(len(prompt), length, block_size):
        stop = min(start + block_size, length)
        fed = 0, length
        while MASK in x[start:stop]:
            z = predictions(network, x, everything) if cache == "none" else row.predictions(x, *fed, length)
            decoded.num_forwards += 1
            tokens = z.argmax(-1)
            for column in rule(z, [column for column in range(start, stop) if x[column] == MASK]):
                x[column] = int(tokens[column])
            fed = (start, length) if cache == "prefix" else (start, stop)
        if stop_at_eos and EOS in x[start:stop]:
            del x[stop:]
            break
    return decoded


def confidence(z: torch.Tensor, column: int) -> float:
    """Probability of the likeliest token."""
    return z[column].softmax(-1).max().item()


def uncertainty(z: torch.Tensor, column: int) -> float:
    """Entropy in nats."""
    p = z[column].softmax(-1)
    p = p[p > 0]
    return -(p * p.log()).sum().item()


def top_n(n: int) -> Rule:
    """The n most confident columns."""
    return lambda z, columns: sorted(columns, key=lambda column: -confidence(z, column))[:n]


def above(threshold: float) -> Rule:
    """Every column above a confidence, and the most confident."""

    def rule(z: torch.Tensor, columns: list[int]) -> list[int]:
        best = max(columns, key=lambda column: confidence(z, column))
        return [column for column in columns if confidence(z, column) > threshold or column == best]

    return rule


def by_factor(factor: float) -> Rule:
    """The released loop: walk the sorted confidences until one falls below its own threshold 1 - factor / (n + 1)."""

    def rule(z: torch.Tensor, columns: list[int]) -> list[int]:
        ordered = sorted(columns, key=lambda column: -confidence(z, column))
        count = 0
        while count < len(ordered) and confidence(z, ordered[count]) > 1 - factor / (count + 2):
            count += 1
        return ordered[: max(count, 1)]

    return rule


def below_entropy(threshold: float) -> Rule:
    """Every column of at most this entropy, and the one of least entropy."""

    def rule(z: torch.Tensor, columns: list[int]) -> list[int]:
        best = min(columns, key=lambda column: uncertainty(z, column))
        return [column for column in columns if uncertainty(z, column) <= threshold or column == best]

    return rule


@dataclass
class PipelineBlock:
    """One block of the D2F reference."""

    start: int
    stop: int
    done: bool = False
    fully: bool = False

    def masked(self, tokens: list[int]) -> list[int]:
        """Columns that wait for a token."""
        return [column for column in range(self.start, self.stop) if tokens[column] == MASK]

    def ratio(self, tokens: list[int]) -> float:
        """Committed share."""
        return 1 - len(self.masked(tokens)) / (self.stop - self.start)

    def commits(self, tokens: list[int], z: torch.Tensor, tau_conf: float) -> list[int]:
        """What is sure enough, or the surest column of a block that must move."""
        masked = self.masked(tokens)
        sure = [column for column in masked if confidence(z, column) > tau_conf]
        stalled = masked and not sure and self.fully
        return [max(masked, key=lambda column: confidence(z, column))] if stalled else sure


def d2f(
    network: DiffusionLM,
    prompt: list[int],
    max_tokens: int,
    block_size: int,
    *,
    tau_add: float,
    tau_act: float,
    tau_conf: float,
    max_active: int = 10**6,
) -> Decoded:
    """Algorithm 2 of the paper, every forward over the whole row and without any cache."""
    decoded = Decoded(prompt + [MASK] * max_tokens, len(prompt))
    x, length = decoded.tokens, len(prompt) + max_tokens
    blocks = [PipelineBlock(0, len(prompt), done=True)]
    while True:
        last, num_active = blocks[-1], sum(not block.done for block in blocks)
        ended = last.stop == length or EOS in x[len(prompt) :]
        if not ended and last.ratio(x) >= tau_add and num_active < max_active:
            blocks.append(PipelineBlock(last.stop, min(last.stop + block_size, length)))
        for before, block in itertools.pairwise(blocks):
            block.fully = block.fully or before.ratio(x) >= tau_act
        if all(block.done for block in blocks):
            break
        z = predictions(network, x[: blocks[-1].stop], block_causal(len(prompt), block_size))
        decoded.num_forwards += 1
        for column in [column for block in blocks for column in block.commits(x, z, tau_conf)]:
            x[column] = int(z[column].argmax())
        for before, block in itertools.pairwise(blocks):
            block.done = before.done and not block.masked(x)
        complete = [block for block in blocks[1:] if EOS in x[block.start : block.stop] and not block.masked(x)]
        if complete:
            blocks = blocks[: blocks.index(complete[0]) + 1]
            x[complete[0].stop :] = [MASK] * (length - complete[0].stop)
    del x[blocks[-1].stop :]
    return decoded


def mix(diffusion: torch.Tensor, verifier: torch.Tensor, weight: float) -> torch.Tensor:
    """R * diffusion + (1 - R) * verifier, with 0 * inf = 0."""
    return sum(part * z for part, z in ((weight, diffusion), (1 - weight, verifier)) if part)


def apd(
    network: DiffusionLM,
    verifier: DiffusionLM,
    prompt: list[int],
    max_tokens: int,
    *,
    weight: float,
    window: int | None,
    lookahead: int,
    temperature: float = 0.0,
    seed: int = 0,
    compat: str = "paper",
) -> Decoded:
    """Algorithm 1 of the paper, one drafted column after another; the verifier never caches."""
    decoded = Decoded(prompt + [MASK] * max_tokens, len(prompt))
    x, t, accepted = decoded.tokens, len(prompt), 0
    row = StaleRow(network)
    while t < len(x):
        stop = min(t + lookahead, len(x))
        if window is None:
            z_d = predictions(network, x[:stop], everything)
        else:
            start = 0 if decoded.num_forwards == 0 else max(t - window - accepted + 1, 0)
            z_d = row.predictions(x[:stop], start, stop, stop)
        decoded.num_forwards += 1
        noise = gumbel_noise(torch.tensor([seed]), torch.arange(stop)[None], VOCAB)[0]
        scale = temperature or 1.0
        noise = noise * (temperature > 0)
        double = temperature if compat == "released" and temperature else 1.0
        draft = (z_d / scale + double * noise).argmax(-1)
        z_a = predictions(verifier, x[:t] + draft[t:stop].tolist(), causal)
        if compat == "released":
            checked = mix(z_d, z_a, weight).argmax(-1)
        else:
            checked = (mix((z_d / scale).log_softmax(-1), (z_a / scale).log_softmax(-1), weight) + noise).argmax(-1)
        accepted = 1
        while t + accepted < stop and draft[t + accepted] == checked[t + accepted]:
            accepted += 1
        x[t : t + accepted] = draft[t : t + accepted].tolist()
        t += accepted
        if EOS in x[len(prompt) : t]:
            break
    del x[t:]
    return decoded


__all__ = ["Decoded", "above", "apd", "below_entropy", "by_factor", "d2f", "semi_autoregressive", "top_n"]
