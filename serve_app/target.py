"""A target replica: a `TargetEngine`, and the link file that tells its workers where their draft is."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.backend import BackendUnavailableError, ReplicaReport
from serve_app.directory import DraftEndpoint, LinkState, keep_telling, shared_secret
from serve_app.gathering import gathered
from serve_app.link_folder import create_link_folder
from serve_app.replica_log import join_replica_log
from serve_app.replica_stats import capture_metrics, target_metrics
from serve_app.scaling import Rate
from serve_app.settings import AppConfig
from serve_app.stall import Stall
from serve_app.tracing import Tracing, span_id, traceparent
from unmask.errors import ConfigError
from unmask.pairing.request_numbers import traced_name
from unmask.types import SamplingOptions, TokenDelta

if TYPE_CHECKING:
    from engines.draft_arguments import RemoteDraftOptions
    from engines.target_engine import TargetEngine
    from unmask.capture import Capture

_WARM_UP = SamplingOptions(max_tokens=4, ignore_eos=True)


class Target:
    """Hosts the engine, whose core and workers are processes of their own; ready when it has answered once.

    Raises:
        UserError: the target, the draft or an engine option does not fit.
    """

    async def __init__(self, config: AppConfig, directory: DeploymentHandle) -> None:
        join_replica_log()
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._directory = directory
        self._secret = await shared_secret(directory)
        self._link: _Link | None = None
        self._capture: Capture | None = None
        self._token_rate = Rate()
        self._tracing = Tracing(config.serve.traces_endpoint, "target", self._replica)
        self._contexts: dict[int, str] = {}
        self._running = 0
        self._stall, self._stall_timeout_s = Stall(), config.serve.stall_timeout_s
        if config.serve.draft is not None:
            self._link = await asyncio.to_thread(_Link.create, config, self._secret)
        self._engine = _engine(config, self._link)
        await self._engine.start()
        async for _ in self._engine.generate("warm-up", [0, 1, 2], _WARM_UP):
            pass
        if config.serve.capture is not None:
            self._capture = await asyncio.to_thread(_capture, config, config.serve.capture)
        self._pids = (os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid))
        self._telling = asyncio.create_task(keep_telling(self._tell))

    async def generate(
        self, request_id: str, prompt_ids: list[int], options: SamplingOptions
    ) -> AsyncGenerator[TokenDelta, None]:
        """Generate one response; cancelling the call aborts it in the engine.

        Raises:
            PromptError: the engine refuses the request.
            BackendUnavailableError: the engine has died; another replica may serve the request.
        """
        from engines.offline_engine import EngineDiedError

        span, reply = self._tracing.start("generate", options.traceparent), _Outcome()
        self._running += 1
        context = traceparent(span)
        if context is not None:
            request_id = traced_name(request_id, span_id(span))
            self._contexts[span_id(span)] = context
        try:
            on_end = self._capture.add if self._capture else None
            source = cast("AsyncGenerator[TokenDelta]", self._engine.generate(request_id, prompt_ids, options, on_end))
            async with aclosing(source) as deltas:
                async for delta in gathered(deltas, options.gather_s):
                    reply.add(delta)
                    yield delta
        except EngineDiedError as error:
            raise BackendUnavailableError(str(error)) from None
        finally:
            self._running -= 1
            self._tracing.finish(span, reply.attributes(len(prompt_ids)))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: the tokens generated each second since the last call."""
        return {"tokens_per_second": self._token_rate.of(self._engine.stats().num_generated_tokens)}

    async def check_health(self) -> None:
        """Called by Serve; a replica that raises is replaced."""
        if not self._engine.alive:
            raise RuntimeError("the engine has ended")
        if self._stall.seconds(self._engine.stats().num_steps, self._running) > self._stall_timeout_s:
            raise RuntimeError("the engine has made no step while requests run")
        if self._telling.done():
            raise RuntimeError("the replica has stopped telling of itself") from self._telling.exception()

    async def __del__(self) -> None:
        """Called by Serve when the replica goes: leave no engine process and no secret behind."""
        if hasattr(self, "_telling"):
            self._telling.cancel()
        if hasattr(self, "_engine"):
            await self._engine.stop()
        if getattr(self, "_capture", None):
            await asyncio.to_thread(self._capture.stop)
        if hasattr(self, "_tracing"):
            await asyncio.to_thread(self._tracing.close)
        if getattr(self, "_link", None):
            shutil.rmtree(self._link.folder, ignore_errors=True)

    async def _tell(self) -> None:
        if await self._directory.agree_on_secret.remote(self._secret) != self._secret:
            raise ConfigError("the application has agreed on another secret since this replica started")
        if self._contexts:
            contexts, self._contexts = self._contexts, {}
            await self._directory.note_contexts.remote(contexts)
        status = self._engine.link_status()
        report = ReplicaReport(
            role="target",
            replica=self._replica,
            pids=self._pids,
            node=ray.get_runtime_context().get_node_id(),
            stats=target_metrics(self._engine.stats(), status) | capture_metrics(self._capture),
        )
        address = self._link.address if self._link else None
        state = LinkState(address=address, connected=bool(status and status["connected"]))
        endpoints: tuple[DraftEndpoint, ...] = await self._directory.note_target.remote(report, state)
        if self._link and endpoints:
            self._link.follow(endpoints, ray.get_runtime_context().get_node_id())


@dataclass(slots=True)
class _Outcome:
    """What became of a request, for its span."""

    tokens: int = 0
    reason: str = "cancelled"
    forwards: int | None = None

    def add(self, delta: TokenDelta) -> None:
        self.tokens += len(delta.token_ids)
        self.reason = delta.finish_reason or self.reason
        self.forwards = delta.num_forwards

    def attributes(self, prompt_tokens: int) -> dict[str, str | int | float]:
        found: dict[str, str | int | float] = {
            "gen_ai.usage.input_tokens": prompt_tokens,
            "gen_ai.usage.output_tokens": self.tokens,
            "gen_ai.response.finish_reasons": self.reason,
        }
        return found | ({"unmask.target_forwards": self.forwards} if self.forwards else {})


@dataclass(slots=True)
class _Link:
    """The files by which the engine's workers find their draft, in a folder that only this user can read."""

    folder: Path
    draft: RemoteDraftOptions
    target_digest: str
    timeout_ms: float
    retry_s: float
    adaptive_k: bool
    addresses: tuple[str, ...] = ()

    @property
    def address(self) -> str | None:
        """Of the draft that is this target's own."""
        return self.addresses[0] if self.addresses else None

    @classmethod
    def create(cls, config: AppConfig, secret: str) -> _Link:
        """Write the secret and a link file that names no draft yet. Raises PairingError."""
        from engines.draft_arguments import RemoteDraftOptions, first_spans
        from unmask.checkpoints import check_pairing
        from unmask.pairing.hello import record_digest
        from unmask.targets import describe_target, resolve_target

        record = describe_target(resolve_target(config.target.model, config.target.revision))
        draft = check_pairing(config.serve.draft or "", record)
        k = config.serve.num_speculative_tokens or draft.block_size - 1
        folder = create_link_folder()
        secret_file = folder / "secret"
        secret_file.touch(mode=0o600)
        secret_file.write_text(secret)
        link = cls(
            folder=folder,
            draft=RemoteDraftOptions(
                link_file=folder / "link.json",
                layer_ids=tuple(draft.target_layer_ids),
                num_speculative_tokens=k,
                timeout_ms=config.serve.draft_limit_ms,
                eight_bit_rows=config.serve.eight_bit_rows,
                turns_from=config.serve.turns_from,
                k_by_batch_size=first_spans(k, config.serve.max_num_seqs) if config.serve.adaptive_k else (),
            ),
            target_digest=record_digest(record).hex(),
            timeout_ms=config.serve.draft_limit_ms,
            retry_s=config.serve.draft_retry_s,
            adaptive_k=config.serve.adaptive_k,
        )
        link._write(None)
        return link

    def follow(self, endpoints: Sequence[DraftEndpoint], node: str) -> None:
        """Name the drafts; workers notice within a quarter of a second.

        One of this node that serves mailboxes is asked alone: the wire to others would cost more than they help.
        """
        folder = endpoints[0].mailbox_folder if endpoints[0].node == node else None
        addresses = tuple(endpoint.address for endpoint in (endpoints[:1] if folder else endpoints))
        if addresses != self.addresses:
            self.addresses = addresses
            self._write(folder)

    def _write(self, mailbox_folder: str | None) -> None:
        from unmask.pairing.link_file import LinkConfig, write_link_file

        write_link_file(
            self.draft.link_file,
            LinkConfig(
                address=self.address,
                further_addresses=self.addresses[1:],
                mailbox_folder=mailbox_folder,
                secret_file=str(self.folder / "secret"),
                timeout_ms=self.timeout_ms,
                retry_s=self.retry_s,
                adaptive_k=self.adaptive_k,
                status_file=str(self.folder / "status"),
                target_digest=self.target_digest,
            ),
        )


def _capture(config: AppConfig, root: str) -> Capture:
    from unmask.capture import Capture
    from unmask.targets import describe_target, resolve_target

    options = config.serve
    return Capture(
        Path(root),
        describe_target(resolve_target(config.target.model, config.target.revision)),
        max_bytes=options.capture_mb * 2**20,
        flush_s=options.capture_flush_s,
    )


def _engine(config: AppConfig, link: _Link | None) -> TargetEngine:
    # Imported where the replica runs: vLLM takes seconds to import, and the ingress never needs it.
    from engines.target_engine import TargetEngine

    return TargetEngine(
        config.target,
        dtype=config.serve.dtype,
        max_num_seqs=config.serve.max_num_seqs,
        on_gpu=config.serve.target_gpus > 0,
        draft=link.draft if link else None,
    )
