"""A toy diffusion LM goes the whole way: adaptation loss, own trajectories, dParallel, D2F.

The task is to copy a sequence pair by pair, each pair in its own order or, in a third of the training texts, swapped.
Both orders are right, so before anything of a pair is committed the teacher is of two minds about it, at every pair:
its certainty spreads one commitment at a time. Certainty forcing on the teacher's own answers makes up its mind.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch

from unmask.decoding.generate import generate
from unmask.decoding.registry import build_decoder
from unmask.decoding.request import Completion, DecodeRequest
from unmask.masking.attention import Full
from unmask.masking.block_causal import BlockCausal
from unmask.masking.schedules import monotone_block_noise, semi_autoregressive_views, uniform_noise
from unmask.models import llada
from unmask.models.transformer import DiffusionLM
from unmask.objectives.adaptation import adaptation_loss, loss_shares
from unmask.objectives.certainty_forcing import certainty_forcing_loss
from unmask.objectives.discrete_forcing import discrete_forcing_loss
from unmask.types import SamplingOptions

SYMBOLS, EOS, SEPARATOR, MASK = 10, 10, 11, 12
COPIED, PROMPT, RESPONSE = 12, 13, 16
LENGTH = PROMPT + RESPONSE
ROWS, LEARNING_RATE = 64, 3e-3
CONFIG = {
    "model_type": "llada", "d_model": 64, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 128, "vocab_size": 13,
    "max_sequence_length": LENGTH, "mask_token_id": MASK, "eos_token_id": EOS,
}  # fmt: skip
PROMPT_LENS, LENGTHS = torch.full((ROWS,), PROMPT), torch.full((ROWS,), LENGTH)
POSITIONS = torch.arange(LENGTH).expand(ROWS, -1)
BLOCK, D2F_BLOCK = 8, 4
ONE_TOKEN = {"name": "one_token", "block_size": BLOCK}
DPARALLEL = {"name": "dparallel", "block_size": BLOCK, "threshold": 0.5}
Loss = Callable[[DiffusionLM, torch.Generator], torch.Tensor]


def texts(count: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [count, LENGTH]: symbols, separator, the copy, EOS padding."""
    symbols = torch.randint(0, SYMBOLS, (count, COPIED), generator=generator)
    pairs = symbols.view(count, -1, 2)
    swapped = torch.rand(*pairs.shape[:2], 1, generator=generator) < 0.35
    copied = torch.where(swapped, pairs.flip(2), pairs).flatten(1)
    separator, padding = torch.full((count, 1), SEPARATOR), torch.full((count, RESPONSE - COPIED), EOS)
    return torch.cat((symbols, separator, copied, padding), dim=1)


def is_right(prompt: list[int], response: list[int]) -> bool:
    """Whether the response is each pair of the prompt, in either order, and then the end."""
    pairs = [(start, start + 2) for start in range(0, COPIED, 2)]
    return response[COPIED : COPIED + 1] == [EOS] and all(
        sorted(response[a:b]) == sorted(prompt[a:b]) for a, b in pairs
    )


def train(network: DiffusionLM, num_steps: int, loss_of: Loss, learning_rate: float, seed: int) -> DiffusionLM:
    """AdamW with a one-cycle rate."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps, pct_start=0.1)
    for _ in range(num_steps):
        loss = loss_of(network, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


def teaching_loss(network: DiffusionLM, generator: torch.Generator) -> torch.Tensor:
    """The 1/t loss on fresh texts."""
    ids = texts(ROWS, generator)
    noisy = uniform_noise(ids, PROMPT_LENS, LENGTHS, mask_id=MASK, generator=generator)
    at = noisy.masked_BT
    shares = loss_shares((POSITIONS >= PROMPT).float())
    logits = network(noisy.ids_BT, POSITIONS, mask=Full(), logits_at=at)
    return adaptation_loss(logits, ids[at], noisy.noise_BT[at], shares[at])


def certainty_loss(trajectories: torch.Tensor) -> Loss:
    """dParallel on the teacher's own texts."""

    def loss(network: DiffusionLM, generator: torch.Generator) -> torch.Tensor:
        ids = trajectories[torch.randint(0, len(trajectories), (ROWS,), generator=generator)]
        views = semi_autoregressive_views(
            ids, PROMPT_LENS, LENGTHS, block_size=BLOCK, mask_id=MASK, generator=generator
        )
        total = torch.zeros(())
        for view in views:
            logits = network(view.ids_BT, POSITIONS, mask=Full(), logits_at=view.loss_BT)
            total = total + certainty_forcing_loss(logits, ids[view.loss_BT]).loss
        return total

    return loss


def forcing_loss(trajectories: torch.Tensor, teacher: DiffusionLM) -> Loss:
    """D2F: the block-causal student follows the bidirectional teacher on the same noisy input."""

    def loss(network: DiffusionLM, generator: torch.Generator) -> torch.Tensor:
        ids = trajectories[torch.randint(0, len(trajectories), (ROWS,), generator=generator)]
        noisy = monotone_block_noise(
            ids, PROMPT_LENS, LENGTHS, block_size=D2F_BLOCK, mask_id=MASK, generator=generator, top=1.0
        )
        at = noisy.masked_BT
        with torch.no_grad():
            wanted = teacher(noisy.ids_BT, POSITIONS, mask=Full(), logits_at=at)
        logits = network(noisy.ids_BT, POSITIONS, mask=BlockCausal(PROMPT_LENS, D2F_BLOCK), logits_at=at)
        return discrete_forcing_loss(logits, wanted, noisy.noise_BT[at]).loss

    return loss


def decode(
    network: DiffusionLM, settings: dict[str, object], prompts: torch.Tensor, **options: bool
) -> list[Completion]:
    requests = [
        DecodeRequest(
            request_id=str(index),
            prompt_ids=tuple(prompt),
            options=SamplingOptions(max_tokens=RESPONSE, **options),
        )
        for index, prompt in enumerate(prompts.tolist())
    ]
    return generate(build_decoder(settings, network), requests)


def score(network: DiffusionLM, settings: dict[str, object]) -> tuple[float, float]:
    """Accuracy and mean forwards on 100 held-out prompts."""
    prompts = texts(100, torch.Generator().manual_seed(9))[:, :PROMPT]
    completions = decode(network, settings, prompts)
    right = [
        is_right(prompt, completion.response_ids)
        for prompt, completion in zip(prompts.tolist(), completions, strict=True)
    ]
    return sum(right) / 100, sum(completion.num_forwards for completion in completions) / 100


@pytest.fixture(scope="module")
def teacher() -> DiffusionLM:
    return train(llada.build(CONFIG, seed=0, std=0.05), 700, teaching_loss, LEARNING_RATE, seed=1)


@pytest.fixture(scope="module")
def trajectories(teacher: DiffusionLM) -> torch.Tensor:
    """Prompts with the teacher's right answers, padding included."""
    prompts = texts(1500, torch.Generator().manual_seed(3))[:, :PROMPT]
    completions = decode(teacher, ONE_TOKEN, prompts, ignore_eos=True)
    rows = [
        [*prompt, *completion.response_ids]
        for prompt, completion in zip(prompts.tolist(), completions, strict=True)
        if is_right(prompt, completion.response_ids)
    ]
    return torch.tensor(rows)


@pytest.fixture(scope="module")
def student(teacher: DiffusionLM, trajectories: torch.Tensor) -> DiffusionLM:
    return train(copy.deepcopy(teacher), 200, certainty_loss(trajectories), LEARNING_RATE / 2, seed=2)


@pytest.fixture(scope="module")
def pipelined(student: DiffusionLM, trajectories: torch.Tensor) -> DiffusionLM:
    network = copy.deepcopy(student)
    network.config = dataclasses.replace(student.config, attention="block_causal", block_size=D2F_BLOCK)
    return train(network, 200, forcing_loss(trajectories, student), LEARNING_RATE / 2, seed=3)


def test_the_teacher_learns_the_task_and_is_of_two_minds(teacher: DiffusionLM, trajectories: torch.Tensor) -> None:
    accuracy, forwards = score(teacher, ONE_TOKEN)
    assert accuracy >= 0.8
    assert forwards == RESPONSE
    assert len(trajectories) >= 0.75 * 1500
    assert score(teacher, DPARALLEL)[1] > 8


def test_dparallel_halves_the_forwards_at_equal_accuracy(teacher: DiffusionLM, student: DiffusionLM) -> None:
    before, forwards_before = score(teacher, DPARALLEL)
    after, forwards_after = score(student, DPARALLEL)
    assert forwards_after <= forwards_before / 2
    assert after >= max(before, score(teacher, ONE_TOKEN)[0]) - 0.02


def test_d2f_decodes_with_an_exact_cache_and_several_tokens_a_forward(
    student: DiffusionLM, pipelined: DiffusionLM
) -> None:
    settings = {"name": "d2f", "block_size": D2F_BLOCK}
    accuracy, forwards = score(pipelined, settings)
    assert accuracy >= score(student, ONE_TOKEN)[0] - 0.03
    assert COPIED / forwards >= 2.5
    assert score(pipelined, {**settings, "cache": False}) == (accuracy, forwards)
