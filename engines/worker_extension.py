"""vLLM's worker extension that puts a remote draft into the V2 runner: importing it is enough."""

from __future__ import annotations

from engines.draft_controls import DraftControls
from engines.runner_hooks import install
from engines.speculator import RemoteSpeculator


class RemoteDraftWorker(DraftControls):
    """Mixed into vLLM's worker by `worker_extension_cls`."""


install(RemoteSpeculator)
