"""Muon for the matrices of a network, AdamW for the rest, as one optimiser whose step can be recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: steep at zero, so that a few rounds bring all singular values near one."""
_ROUNDS = 5
_MOMENTUM = 0.95
_RMS = 0.2
"""Of an update by AdamW, which those of Muon are brought to: both can then have one learning rate."""


@dataclass(frozen=True, slots=True)
class Deal:
    """Which matrices a rank makes orthogonal: all ranks have the same gradients, and each takes its share.

    Args:
        sum_over_ranks: of a tensor, in place or not.
    """

    rank: int = 0
    world_size: int = 1
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def orthogonal(self, wide_NAB: Tensor, first: int) -> Tensor:
        """`orthogonal` of N matrices, of which the first is number `first` of a step: every rank has all of them."""
        if self.world_size == 1:
            return orthogonal(wide_NAB)
        made = torch.zeros_like(wide_NAB, dtype=_precision(wide_NAB))
        share = slice((self.rank - first) % self.world_size, None, self.world_size)
        if len(made[share]):
            made[share] = orthogonal(wide_NAB[share])
        return self.sum_over_ranks(made)


class Muon(torch.optim.AdamW):
    """Momentum whose matrices are made orthogonal (K. Jordan, 2024), scaled to AdamW's updates and with decoupled
    weight decay (Liu et al., arXiv 2502.16982, eq. 4); AdamW takes the other parameters.

    The same update as `torch.optim.Muon`, which takes one matrix after another and reads its rate on the host. This one
    takes all matrices of a shape together, and its rate may be a tensor, so that a CUDA graph can hold the step.
    Hooks on a step are called for each of the two.

    Args:
        matrices: parameters [A, B] of hidden layers.
        others: norms, biases, embeddings, heads.
        deal: of several ranks.
        matrix_decay: weight decay of the matrices; 0.1 is the paper's. It is no part of the state: a run that goes on
            decays as it is told now.
        adamw: arguments of `torch.optim.AdamW`; `lr` is that of both, `weight_decay` that of the others.

    Raises:
        ValueError: `matrices` holds something else.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        deal: Deal | None = None,
        *,
        matrix_decay: float = 0.1,
        **adamw: Any,
    ) -> None:
        self._deal, self._matrix_decay = deal or Deal(), matrix_decay
        groups = [{"params": list(matrices), "orthogonal": True}, {"params": list(others), "orthogonal": False}]
        super().__init__([group for group in groups if group["params"]], **adamw)
        if any(p.ndim != 2 for group in self.param_groups if group["orthogonal"] for p in group["params"]):
            raise ValueError("only matrices can be made orthogonal")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters; the gradients of matrices are gone then."""
        for group in self.param_groups:
            if group["orthogonal"]:
                self._update([p for p in group["params"] if p.grad is not None], group["lr"])
        super().step(closure)

    def _update(self, matrices: Sequence[Tensor], rate: float | Tensor) -> None:
        alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for matrix in matrices:
            alike.setdefault(tuple(sorted(matrix.shape)), []).append((matrix, self._direction(matrix)))
        dealt = 0
        for (_, longer), pairs in alike.items():
            wide = torch.stack([_widened(direction) for _, direction in pairs])
            updates = self._deal.orthogonal(wide, dealt).to(wide.dtype) * (-_RMS * math.sqrt(longer) * rate)
            dealt += len(pairs)
            for (matrix, _), update in zip(pairs, updates.unbind(), strict=True):
                _widened(matrix).mul_(1 - rate * self._matrix_decay).add_(update)

    def _direction(self, matrix: Tensor) -> Tensor:
        """Nesterov's, of a gradient that is used up."""
        gradient, matrix.grad = cast(Tensor, matrix.grad), None
        state = self.state[matrix]
        if not state:
            # AdamW looks for `step` in every state that is loaded.
            state |= {"step": torch.zeros((), device=matrix.device), "momentum": torch.zeros_like(matrix)}
        momentum = state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        return gradient.lerp(momentum, _MOMENTUM)


def orthogonal(wide_NAB: Tensor) -> Tensor:
    """The nearest matrices whose singular values are all about one: N matrices [A, B], A <= B; bfloat16 on a GPU."""
    a, b, c = _COEFFICIENTS
    x = wide_NAB.to(_precision(wide_NAB))
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _precision(matrices: Tensor) -> torch.dtype:
    return torch.bfloat16 if matrices.is_cuda else matrices.dtype


def _widened(matrix: Tensor) -> Tensor:
    """It, or its transpose, whichever has no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
