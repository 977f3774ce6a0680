"""Metrics of a step that stay on the device until somebody reads one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class StepReport(Mapping[str, float]):
    """Scalars by name; the first read brings all of them to the host in one copy.

    A step that is not read does not make the host wait for the device.

    Args:
        on_device: scalar tensors of one device.
        on_host: plain numbers.
    """

    def __init__(self, on_device: Mapping[str, Tensor], on_host: Mapping[str, float]) -> None:
        self._names = tuple(on_device)
        self._pending: Tensor | None = torch.stack([value.detach().float() for value in on_device.values()])
        self._values = dict.fromkeys(on_device, 0.0) | dict(on_host)

    def __getitem__(self, name: str) -> float:
        if self._pending is not None:
            self._values |= zip(self._names, self._pending.tolist(), strict=True)
            self._pending = None
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
