"""What can be asked of a worker with a remote draft by RPC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engines.speculator import RemoteSpeculator
from engines.step_times import StepTimes
from engines.turns import turns
from unmask.pairing.mailbox_words import ANSWERED, DRAFT_NS, LATE, RELEASED


class DraftControls:
    """Mixed into vLLM's worker (`worker_extension_cls`); the methods are called by `collective_rpc`."""

    model_runner: Any

    def set_speculation(self, ks: Sequence[int]) -> None:
        """K for each batch size 0 .. max_num_seqs (see `RemoteSpeculator.set_ks`), whatever the load from now on.

        Graphs exist only for the Ks that the engine was configured with.
        """
        speculator = self._speculator()
        if isinstance(speculator, RemoteSpeculator):
            speculator.watch = None
        speculator.set_ks(ks)

    def take_turns_from(self, least: int | None) -> None:
        """Running requests from which they take turns from now on; None is never."""
        turns.least = least

    def measure_steps(self, batch_size: int) -> None:
        """Begin to time steps of this batch size."""
        speculator = self._speculator()
        speculator.times = StepTimes(speculator.device, batch_size)

    def step_times(self) -> dict[str, float]:
        """End it: medians in ms (see `StepTimes.summary`)."""
        speculator = self._speculator()
        times, speculator.times = speculator.times, None
        return times.summary() if times is not None else {}

    def draft_counters(self) -> dict[str, int]:
        """Steps that the draft was asked, answered and passed by, its time for them, and what its watchdog has seen."""
        speculator = self._speculator()
        if not isinstance(speculator, RemoteSpeculator) or speculator.target is None:
            return {}
        box = speculator.mailbox
        return {
            "asked": speculator.target.asked,
            "passed": speculator.target.passed,
            "answered": box.long_word(ANSWERED),
            "draft_us": box.long_word(DRAFT_NS) // 1000,
            "released": box.word(RELEASED),
            "late": box.word(LATE),
            "is_ready": int(speculator.target.is_ready),
        }

    def _speculator(self) -> Any:
        return self.model_runner.speculator
