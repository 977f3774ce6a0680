"""A draft replica: a `DraftServer` in a process that Serve places and watches."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import ray.util
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.backend import ReplicaReport
from serve_app.directory import DraftEndpoint, keep_telling, shared_secret
from serve_app.replica_log import join_replica_log
from serve_app.replica_stats import draft_metrics
from serve_app.scaling import Rate
from serve_app.settings import AppConfig
from serve_app.tracing import Tracing
from unmask.errors import CheckpointError, ConfigError, PairingError
from unmask.files import private_folder

if TYPE_CHECKING:
    from unmask.pairing.request_log import DraftedRequest
    from unmask.pairing.server import DraftServer
    from unmask.types import TargetRecord

logger = logging.getLogger(__name__)

_RETRY_S = 60.0
"""When a draft that was refused and is still wanted is tried again."""
_ENDED_S = 2.0
"""A traced request that no step has named for so long has ended."""
_FORGOTTEN_S = 30.0
"""How long its target may take to say which trace it belongs to."""


class Draft:
    """Loads the draft, binds a socket on the node's address, and tells the directory where.

    The directory may name another draft at any time; it is swapped in between two steps, and targets run on.

    Raises:
        PairingError: the draft was not trained for this target.
        CheckpointError: the draft or the target's vocabulary cannot be read.
    """

    async def __init__(self, config: AppConfig, directory: DeploymentHandle) -> None:
        join_replica_log()
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._directory = directory
        self._secret = await shared_secret(directory)
        self._busy_rate = Rate()
        self._first = config.serve.draft or ""
        self._swapped_in: str | None = None
        self._num_refused = 0
        self._refused: tuple[str, float] = ("", 0.0)
        self._swapping: asyncio.Task[None] | None = None
        self._tracing = Tracing(config.serve.traces_endpoint, "draft", self._replica)
        self._untold: list[DraftedRequest] = []
        self._server, self._record = await asyncio.to_thread(_start_server, config, self._secret)
        self._telling = asyncio.create_task(keep_telling(self._tell))

    def endpoint(self) -> DraftEndpoint:
        """Where target workers connect."""
        return DraftEndpoint(
            address=self._server.address,
            version=self._server.stats().draft_version,
            pid=os.getpid(),
            node=ray.get_runtime_context().get_node_id(),
            mailbox_folder=self._server.mailbox_folder,
        )

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: the share of the time since the last call that the engine computed."""
        return {"busy": self._busy_rate.of(self._server.stats().busy_s)}

    async def check_health(self) -> None:
        """Called by Serve; a replica that raises is replaced."""
        if not self._server.alive:
            raise RuntimeError("the draft engine has ended")
        if self._telling.done():
            raise RuntimeError("the replica has stopped telling of itself") from self._telling.exception()

    async def __del__(self) -> None:
        """Called by Serve when the replica goes: targets notice at once."""
        if hasattr(self, "_telling"):
            self._telling.cancel()
        if hasattr(self, "_server"):
            self._server.stop()
        if hasattr(self, "_tracing"):
            await asyncio.to_thread(self._tracing.close)

    async def _tell(self) -> None:
        if await self._directory.agree_on_secret.remote(self._secret) != self._secret:
            raise ConfigError("the application has agreed on another secret since this replica started")
        wanted = await self._directory.agree_on_draft.remote(self._first, self._swapped_in)
        is_swapping = self._swapping is not None and not self._swapping.done()
        if wanted not in (None, self._swapped_in or self._first) and not is_swapping and self._may_try(wanted):
            # Beside the beats: loading takes as long as the storage takes, and a silent replica counts as gone.
            self._swapping = asyncio.create_task(self._swap(wanted))
        stats = draft_metrics(self._server.stats()) | {"unmask_draft_swaps_refused_total": self._num_refused}
        report = ReplicaReport(
            role="draft",
            replica=self._replica,
            pids=(os.getpid(),),
            node=ray.get_runtime_context().get_node_id(),
            stats=stats,
            checkpoint=self._swapped_in or self._first,
        )
        await self._directory.note_draft.remote(report, self.endpoint())
        if self._tracing.enabled:
            await self._trace(time.time())

    async def _trace(self, now_s: float) -> None:
        """Spans of what was drafted for requests that have ended, under those of their targets."""
        self._untold += self._server.take_traced(now_s - _ENDED_S)
        contexts = await self._directory.contexts_of.remote([request.number for request in self._untold])
        for request in self._untold:
            if (parent := contexts.get(request.number)) is None:
                continue
            span = self._tracing.start("draft", parent, begun_s=request.begun_s)
            attributes = {
                "unmask.draft_steps": request.steps,
                "unmask.proposed_tokens": request.proposed_tokens,
                "unmask.compute_ms": request.compute_s * 1e3,
            }
            self._tracing.finish(span, attributes, ended_s=request.ended_s)
        self._untold = [
            request
            for request in self._untold
            if request.number not in contexts and request.ended_s > now_s - _FORGOTTEN_S
        ]

    def _may_try(self, path: str) -> bool:
        """Whether a draft has not been refused lately; what was wrong with it may have been mended since."""
        refused, at = self._refused
        return path != refused or time.monotonic() - at > _RETRY_S

    async def _swap(self, path: str) -> None:
        from unmask.pairing.replacement import replace_draft

        try:
            version = await asyncio.to_thread(replace_draft, self._server, path, self._record)
        except (CheckpointError, PairingError, OSError, RuntimeError) as error:
            # Also storage that fails, and a device without room for a second draft.
            self._num_refused += 1
            self._refused = path, time.monotonic()
            logger.error("the draft '%s' was refused, the old one goes on: %s", path, error)
            await self._directory.refuse_draft.remote(path)
            return
        self._swapped_in = path
        logger.info("the draft '%s' is live, version %d", path, version)


def _start_server(config: AppConfig, secret: str) -> tuple[DraftServer, TargetRecord]:
    # Imported where the replica runs: the process that builds the application loads no model code.
    import torch

    from unmask.checkpoints import check_pairing, load_confidence, load_draft
    from unmask.pairing.graphed_blocks import halvings
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
    largest = check_pairing(path, record).block_size - 1
    embedding, lm_head = (table.to(device) for table in load_vocabulary(target, dtype))
    server = DraftServer(
        load_draft(path, dtype).to(device),
        embedding,
        lm_head,
        secret.encode(),
        host=ray.util.get_node_ip_address(),
        memory_mb=options.draft_memory_mb,
        record=record,
        confidence=load_confidence(path),
        # A K without a graph of its own would have one recorded while a step waits for it.
        graph_ks=sorted({k for most in (options.num_speculative_tokens or largest, largest) for k in halvings(most)}),
        mailbox_folder=_mailbox_folder() if on_gpu else None,
    )
    server.start()
    return server, record


def _mailbox_folder() -> Path:
    """A folder of shared memory for this process; those of processes that are gone are removed."""
    parent = Path("/dev/shm") / f"unmask-{os.getuid()}"  # noqa: S108 - private to this user
    private_folder(parent)
    for folder in parent.glob("draft-*"):
        if not Path("/proc", folder.name.removeprefix("draft-")).exists():
            shutil.rmtree(folder, ignore_errors=True)
    return parent / f"draft-{os.getpid()}"
