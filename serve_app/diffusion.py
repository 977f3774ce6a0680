"""A replica of a diffusion LM: one engine, one process, one thread that owns the device."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.backend import ReplicaReport
from serve_app.diffusion_engine import StreamingEngine
from serve_app.diffusion_library import engine_config, library_shape, load_library, warm_up_request
from serve_app.directory import keep_telling
from serve_app.replica_log import join_replica_log
from serve_app.replica_stats import diffusion_metrics
from serve_app.settings import AppConfig
from serve_app.tracing import Tracing
from unmask.decoding.request import DecodeRequest
from unmask.types import SamplingOptions, TokenDelta


class Diffusion:
    """Hosts the engine; ready when it has answered once.

    Raises:
        UserError: the checkpoint or the default decoder cannot be served.
    """

    async def __init__(self, config: AppConfig, directory: DeploymentHandle) -> None:
        join_replica_log()
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._directory = directory
        options = config.serve
        self._tracing = Tracing(options.traces_endpoint, "diffusion", self._replica)
        self._engine = await asyncio.to_thread(StreamingEngine, lambda: load_library(options), engine_config(options))
        async for _ in self._engine.generate(warm_up_request(library_shape(options).denoiser), None):
            pass
        self._telling = asyncio.create_task(keep_telling(self._tell))

    async def generate(
        self, request_id: str, prompt_ids: list[int], options: SamplingOptions, prefix: tuple[int, ...]
    ) -> AsyncGenerator[TokenDelta, None]:
        """Generate one response; cancelling the call frees its row.

        Args:
            request_id: unique in the application.
            prompt_ids: the prompt.
            options: how to decode.
            prefix: the response's beginning, where another replica has sent it.

        Raises:
            UserError: the engine refuses the request.
            BackendUnavailableError: the engine has ended; another replica may serve the request.
        """
        request = DecodeRequest(request_id=request_id, prompt_ids=tuple(prompt_ids), options=options, prefix=prefix)
        source = cast("AsyncGenerator[TokenDelta]", self._engine.generate(request, options.decoder))
        span, tokens = self._tracing.start("generate", options.traceparent), 0
        try:
            async with aclosing(source) as deltas:
                async for delta in deltas:
                    tokens += len(delta.token_ids)
                    yield delta
        finally:
            counts = {"gen_ai.usage.input_tokens": len(prompt_ids), "gen_ai.usage.output_tokens": tokens}
            self._tracing.finish(span, counts)

    async def check_health(self) -> None:
        """Called by Serve: waits until the engine has answered; a replica that raises is replaced."""
        await self._engine.check()
        if self._telling.done():
            raise RuntimeError("the replica has stopped telling of itself") from self._telling.exception()

    async def __del__(self) -> None:
        """Called by Serve when the replica goes."""
        if hasattr(self, "_telling"):
            self._telling.cancel()
        if hasattr(self, "_engine"):
            await asyncio.to_thread(self._engine.stop)
        if hasattr(self, "_tracing"):
            await asyncio.to_thread(self._tracing.close)

    async def _tell(self) -> None:
        report = ReplicaReport(
            role="diffusion",
            replica=self._replica,
            pids=(os.getpid(),),
            node=ray.get_runtime_context().get_node_id(),
            stats=diffusion_metrics(self._engine.stats),
        )
        await self._directory.note_diffusion.remote(report)
