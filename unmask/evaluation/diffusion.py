"""What a diffusion decoder reached on a task: accuracy, forwards, parallelism, and the order of commitments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from unmask.decoding.request import Completion

Judge = Callable[[int, list[int]], bool]
"""(index of the prompt, response ids) -> whether the response is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingSummary:
    """One decoder with one setting on one task."""

    n: int
    accuracy: float
    """Percent."""
    ci95: tuple[float, float]
    """Wilson interval of the accuracy, percent."""
    nfe: float
    """Mean forwards a response, those spent on EOS padding included."""
    nfe_at_eos: float
    """Mean forwards until the response's end was committed (all of them where it never was)."""
    tpf: float
    """Response tokens before the stop id, over forwards; both summed over responses."""
    ended: float
    """Share of the responses that have a stop id."""


def summarise(completions: Sequence[Completion], judge: Judge) -> DecodingSummary:
    """Pool the completions of prompts 0, 1, ... of one setting.

    Raises:
        ValueError: no completions.
    """
    if not completions:
        raise ValueError("no completions to summarise")
    right = sum(judge(index, c.response_ids) for index, c in enumerate(completions))
    count = len(completions)
    forwards = sum(c.num_forwards for c in completions)
    low, high = wilson_interval(right, count)
    return DecodingSummary(
        n=count,
        accuracy=100 * right / count,
        ci95=(100 * low, 100 * high),
        nfe=forwards / count,
        nfe_at_eos=sum(c.forwards_at_eos or c.num_forwards for c in completions) / count,
        tpf=sum(c.num_text_tokens for c in completions) / max(forwards, 1),
        ended=sum(c.forwards_at_eos is not None for c in completions) / count,
    )


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a binomial share (Wilson 1927): sound near 0 and 1, unlike the normal one."""
    share, square = successes / trials, z * z
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    spread = z * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials)) / (1 + square / trials)
    return max(centre - spread, 0.0), min(centre + spread, 1.0)


def accuracy_under_parallelism(points: Sequence[tuple[float, float]], best: float | None = None) -> float:
    """AUP (d3LLM): the area under accuracy over TPF, in which lost accuracy counts ever less.

    Points are sorted by TPF rho; those more than 5 points below the first accuracy y_1 are dropped; then
    AUP = rho_1 y_1 + sum_i (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2 with
    W(y) = min(exp(-3 (1 - y / y_max)), 1).

    Args:
        points: (TPF, accuracy in percent) of one model and decoder at several settings.
        best: y_max; None takes the best of these points. Give one value for all systems that are compared.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("no operating points")
    ordered = sorted(points)
    first = ordered[0][1]
    kept = [point for point in ordered if point[1] >= first - 5]
    most = max((y for _, y in kept), default=0.0) if best is None else best

    def weighted(y: float) -> float:
        return y * min(math.exp(-3 * (1 - y / most)), 1.0) if most else 0.0

    area = kept[0][0] * kept[0][1]
    for (rho, y), (rho_next, y_next) in itertools.pairwise(kept):
        area += (rho_next - rho) * (weighted(y) + weighted(y_next)) / 2
    return area


def commit_order(completions: Sequence[Completion], num_columns: int) -> np.ndarray:
    """Heat map of when columns are committed: float64 [S, C], share of responses that commit column c at forward s.

    Args:
        num_columns: C; later response columns are left out. S is the most forwards that any response took.
    """
    steps = max((max(c.commit_step, default=0) for c in completions), default=0)
    heat = np.zeros((steps, num_columns))
    for completion in completions:
        for column, step in enumerate(completion.commit_step[:num_columns]):
            heat[step - 1, column] += 1
    return heat / max(len(completions), 1)
