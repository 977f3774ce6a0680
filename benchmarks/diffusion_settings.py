"""The lines of `diffusion_quality`'s table: every decoder and setting, on the networks it is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of the table."""

    checkpoint: str
    decoder: str
    knobs: dict[str, Any]
    timed: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What `build_decoder` takes."""
        return {"name": self.decoder, **self.knobs}


def settings() -> list[Setting]:
    """Every decoder on the networks it is for; the first is the quality ceiling."""
    block = {"block_size": 16}
    table = [Setting("teacher", "one_token", block, timed=True)]
    for threshold in (0.9, 0.95, 0.98, 0.99, 0.995):
        table.append(Setting("teacher", "threshold", {**block, "threshold": threshold}, timed=threshold == 0.9))
    for threshold in (0.9, 0.97, 0.99):
        table.append(Setting("teacher", "threshold", {**block, "threshold": threshold, "cache": "dual"}, timed=True))
    # The student's own ceiling, and its training apart from its criterion.
    table.append(Setting("dparallel", "one_token", block))
    table.append(Setting("dparallel", "threshold", {**block, "threshold": 0.9}))
    for threshold in (0.3, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002):
        table.append(Setting("dparallel", "dparallel", {**block, "threshold": threshold}, timed=threshold == 0.02))
    table.append(Setting("dparallel", "dparallel", {**block, "threshold": 0.02, "cache": "dual"}, timed=True))
    for confidence in (0.9, 0.95, 0.98, 0.99):
        table.append(Setting("d2f", "d2f", {**block, "tau_conf": confidence}, timed=confidence in (0.9, 0.98)))
    for threshold in (0.3, 0.1, 0.05, 0.02, 0.01):
        table.append(Setting("dparallel_d2f", "d2f", {**block, "tau_entropy": threshold}, timed=threshold >= 0.1))
    for confidence in (0.9, 0.95, 0.98):
        table.append(Setting("dparallel_d2f", "d2f", {**block, "tau_conf": confidence}))
    for weight, window, ahead in (
        (0.1, None, 128), (0.3, None, 128), (0.5, None, 128), (0.7, None, 128), (0.5, 16, 128), (0.5, 32, 128),
        (0.5, None, 16), (0.5, None, 32), (0.5, None, 64),
    ):  # fmt: skip
        knobs = {"mixture_weight": weight, "kv_window": window, "max_lookahead": ahead}
        table.append(Setting("teacher", "apd", knobs))
    for weight in (0.3, 0.5):
        knobs = {"mixture_weight": weight, "kv_window": None, "max_lookahead": 128}
        table.append(Setting("dparallel", "apd", knobs))
    return table
