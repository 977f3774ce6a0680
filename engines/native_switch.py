"""vLLM's own colocated DFlash draft and remote ones in one engine, switched at run time: for comparisons.

Both see the same graphs, the same KV cache and the same load. `SwitchableWorker` is the worker extension. The mode must
not change while requests run: a draft that did not see their beginning has a gap there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

from engines.draft_controls import DraftControls
from engines.runner_hooks import install
from engines.speculator import RemoteSpeculator
from engines.step_times import StepTimes

MODES = ("native", "remote", "tcp")
"""vLLM's draft; a draft on this host through the mailbox; the link file's drafts through a sidecar."""


class SwitchableSpeculator(DFlashSpeculator):
    """Asks one of three drafts."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.mode = "native"
        self.remotes = {
            "remote": RemoteSpeculator(vllm_config, device),
            "tcp": RemoteSpeculator(vllm_config, device, folder=""),
        }
        self.times: StepTimes | None = None

    @torch.inference_mode()
    def propose(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> Tensor:
        """See `BaseSpeculator.propose`."""
        if self.mode != "native" and not kwargs.get("dummy_run") and not kwargs.get("is_profile"):
            return self.remotes[self.mode].propose(input_batch, *args, **kwargs)
        if self.times is None:
            return super().propose(input_batch, *args, **kwargs)
        self.times.begin(input_batch.num_reqs)
        tokens = super().propose(input_batch, *args, **kwargs)
        self.times("end")
        return tokens

    def set_ks(self, ks: Any) -> None:
        """The scheduler's K; vLLM's draft always drafts all rows."""
        self.remotes["remote"].set_ks(ks)

    def introduce(self, name: str, tokens: Any, num_computed: int) -> None:
        """A request begins."""
        for remote in self.remotes.values():
            remote.introduce(name, tokens, num_computed)

    def begin(self, names: Any, draft_tokens: Tensor, comes_later: bool) -> None:
        """A step begins."""
        if self.mode != "native":
            self.remotes[self.mode].begin(names, draft_tokens, comes_later)

    def finish(self, names: Any) -> None:
        """Requests that have ended."""
        ended = list(names)
        for remote in self.remotes.values():
            remote.finish(ended)


class SwitchableWorker(DraftControls):
    """The controls of whichever draft is chosen."""

    def choose_draft(self, mode: str) -> None:
        """Ask this draft (`MODES`) from now on."""
        speculator = self.model_runner.speculator
        speculator.mode = mode
        # Whoever chooses waits for the draft before the first step, which would start it otherwise.
        if mode != "native" and speculator.remotes[mode].target is not None:
            speculator.remotes[mode].target.start()

    def _speculator(self) -> Any:
        speculator = self.model_runner.speculator
        return speculator if speculator.mode == "native" else speculator.remotes[speculator.mode]


install(SwitchableSpeculator)
