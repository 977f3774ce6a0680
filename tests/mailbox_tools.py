"""A mailbox whose target and draft are threads, and steps as a target's sampler would leave them, for tests."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.pairing_tools import BLOCK_SIZE, HIDDEN, LAYER_IDS
from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.mailbox import Mailbox
from unmask.pairing.mailbox_layout import Layout
from unmask.pairing.packed_rows import StepTensors

LAYOUT = Layout(max_requests=8, max_rows=64, width=HIDDEN, dtype=torch.float32, max_k=BLOCK_SIZE - 1)


@dataclass(frozen=True)
class TargetStep:
    """A step of an imagined target, and what its draft should see of it: (name, start, rows, anchor) a request."""

    names: list[str]
    states: list[Tensor]
    tensors: StepTensors
    coming: ComingRows
    seen: list[tuple[str, int, Tensor, int]]


class ImaginedTarget:
    """Requests that are prefilled in chunks, then verify drafts with random acceptance."""

    def __init__(self, seed: int, num_slots: int = 8) -> None:
        self.random = random.Random(seed)
        self.num_slots = num_slots
        self.reached: dict[str, int] = {}
        self.prompts: dict[str, int] = {}
        self.born = 0

    def step(self) -> TargetStep:
        """The next step; some requests are born, the caller ends them with `end`."""
        while len(self.reached) < self.random.randint(1, self.num_slots):
            name = f"request-{self.born}"
            self.born += 1
            self.reached[name], self.prompts[name] = 0, self.random.randint(1, 14)
        names = self.random.sample(sorted(self.reached), self.random.randint(1, len(self.reached)))
        starts, told, sampled, rejected, positions, seen = [0], [], [], [], [], []
        slots = self.random.sample(range(self.num_slots), len(names))
        last_sampled = torch.randint(0, 90, (self.num_slots, 1))
        for name in names:
            reached = self.reached[name]
            is_prompt = reached < self.prompts[name]
            length = self.random.randint(1, self.prompts[name] - reached) if is_prompt else self.random.randint(1, 6)
            ends = reached + length >= self.prompts[name]
            lost = 0 if is_prompt else self.random.randint(0, length - 1)
            positions += range(reached, reached + length)
            told.append(reached if is_prompt else -1)
            starts.append(starts[-1] + length)
            sampled.append((length - lost if not is_prompt else 1) if ends else 0)
            rejected.append(lost)
            self.reached[name] += length - lost
        states = [torch.randn(starts[-1] + 3, HIDDEN) for _ in LAYER_IDS]
        raw = torch.cat(states, dim=-1)
        for i, name in enumerate(names):
            first, kept = starts[i], starts[i + 1] - starts[i] - rejected[i]
            anchor = int(last_sampled[slots[i]]) if sampled[i] else -1
            seen.append((name, positions[first], raw[first : first + kept], anchor))
        tensors = StepTensors(
            positions=torch.tensor(positions),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            num_sampled=torch.tensor(sampled, dtype=torch.int32),
            num_rejected=torch.tensor(rejected, dtype=torch.int32),
            slots=torch.tensor(slots, dtype=torch.int32),
            last_sampled=last_sampled,
        )
        coming = ComingRows(np.diff(starts), np.array(told))
        return TargetStep(names, states, tensors, coming, seen)

    def end(self) -> list[str]:
        """Names of requests that end now."""
        ended = [name for name in self.reached if self.random.random() < 0.1]
        for name in ended:
            del self.reached[name], self.prompts[name]
        return ended


def answers(*blocks: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and counts of blocks of up to K ids."""
    padded = [block + [0] * (LAYOUT.max_k - len(block)) for block in blocks]
    return np.array(padded, dtype=np.int32), np.array([len(block) for block in blocks])


@contextmanager
def watchdog(mailbox: Mailbox, limit_ms: float) -> Iterator[subprocess.Popen]:
    """The real watchdog process."""
    command = [sys.executable, "-m", "unmask.pairing.watchdog", str(mailbox.path), "--limit-ms", str(limit_ms)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=Path(__file__).parents[1])
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(10)
