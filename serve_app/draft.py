"""A draft replica: a `DraftServer` in a process that Serve places and watches."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import ray.util
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.backend import ReplicaReport
from serve_app.directory import DraftEndpoint, keep_telling
from serve_app.replica_log import join_replica_log
from serve_app.replica_stats import draft_metrics
from serve_app.settings import AppConfig
from unmask.errors import ConfigError

if TYPE_CHECKING:
    from unmask.pairing.server import DraftServer


class Draft:
    """Loads the draft, binds a socket on the node's address, and tells the directory where.

    Raises:
        PairingError: the draft was not trained for this target.
        CheckpointError: the draft or the target's vocabulary cannot be read.
    """

    async def __init__(self, config: AppConfig, directory: DeploymentHandle) -> None:
        join_replica_log()
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._directory = directory
        self._secret: str = await directory.agree_on_secret.remote(None)
        self._server = await asyncio.to_thread(_start_server, config, self._secret)
        self._telling = asyncio.create_task(keep_telling(self._tell))

    def endpoint(self) -> DraftEndpoint:
        """Where target workers connect."""
        return DraftEndpoint(address=self._server.address, version=self._server.stats().draft_version, pid=os.getpid())

    async def check_health(self) -> None:
        """Called by Serve; a replica that raises is replaced."""
        if not self._server.alive:
            raise RuntimeError("the draft engine has ended")
        if self._telling.done():
            raise RuntimeError("the replica has stopped telling of itself") from self._telling.exception()

    async def __del__(self) -> None:
        """Called by Serve when the replica goes: targets notice at once."""
        if hasattr(self, "_server"):
            self._server.stop()

    async def _tell(self) -> None:
        if await self._directory.agree_on_secret.remote(self._secret) != self._secret:
            raise ConfigError("the application has agreed on another secret since this replica started")
        stats = draft_metrics(self._server.stats())
        report = ReplicaReport(role="draft", replica=self._replica, pids=(os.getpid(),), stats=stats)
        await self._directory.note_draft.remote(report, self.endpoint())


def _start_server(config: AppConfig, secret: str) -> DraftServer:
    # Imported where the replica runs: the process that builds the application loads no model code.
    import torch

    from unmask.checkpoints import check_pairing, load_draft
    from unmask.pairing.server import DraftServer
    from unmask.pairing.vocabulary import load_vocabulary
    from unmask.targets import describe_target, resolve_target

    options = config.serve
    on_gpu = options.draft_gpus > 0
    name = options.dtype if options.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
    dtype, device = getattr(torch, name), "cuda" if on_gpu else "cpu"
    path = Path(options.draft or "")
    target = resolve_target(config.target.model, config.target.revision)
    record = describe_target(target)
    check_pairing(path, record)
    embedding, lm_head = (table.to(device) for table in load_vocabulary(target, dtype))
    server = DraftServer(
        load_draft(path, dtype).to(device),
        embedding,
        lm_head,
        secret.encode(),
        host=ray.util.get_node_ip_address(),
        memory_mb=options.draft_memory_mb,
        record=record,
    )
    server.start()
    return server
