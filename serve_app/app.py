"""The application: an HTTP ingress, replicas of targets, drafts and diffusion LMs, and the directory that knows them.

`serve deploy serve_app/config.yaml` builds it on a cluster from `build`; `serve_pairing` runs it from a process that
has joined one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from serve_app.admission import Admission
from serve_app.auth import KeyFile
from serve_app.backend import Backend, BackendUnavailableError, ReplicaReport
from serve_app.directory import BEAT_S, Directory
from serve_app.draft import Draft
from serve_app.ingress import create_app
from serve_app.replica_log import join_replica_log
from serve_app.replicas import DiffusionReplicas, ReplicaBackend
from serve_app.service import Service
from serve_app.settings import (
    AppConfig,
    diffusion_options,
    directory_options,
    draft_options,
    ingress_options,
    parse_args,
    target_options,
)
from serve_app.target import Target
from serve_app.telemetry import Telemetry
from serve_app.tracing import Tracing
from unmask.config import ServeConfig
from unmask.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from engines.tool_calls import ToolParsers
    from serve_app.tokenizer import ChatTokenizer

logger = logging.getLogger(__name__)


@serve.ingress()
class Ingress:
    """The HTTP application over the replicas of each model.

    Raises:
        CheckpointError: a model's tokenizer cannot be read.
    """

    async def __init__(
        self,
        config: AppConfig,
        target: DeploymentHandle | None,
        directory: DeploymentHandle,
        draft: DeploymentHandle | None,
        diffusion: DeploymentHandle | None = None,
    ) -> None:
        join_replica_log()
        self._draft = draft  # held so that Serve deploys it with the application
        self._directory = directory
        options = config.serve
        self._keys = KeyFile(Path(options.api_keys_file)) if options.api_keys_file else None
        target_admission = Admission(config.slots, options.max_queued)
        diffusion_admission = Admission(config.diffusion_slots, options.max_queued)
        telemetry = Telemetry(target_admission, diffusion_admission)
        self._tracing = Tracing(options.traces_endpoint, "ingress")
        services = []
        if target is not None:
            backend = ReplicaBackend(target, directory, telemetry.resumed.inc)
            services.append(_target_service(config, backend, target_admission, telemetry))
        if diffusion is not None:
            backend = DiffusionReplicas(diffusion, directory, telemetry.resumed.inc)
            services.append(_diffusion_service(config, backend, diffusion_admission, telemetry))
        self._service = replace(services[0], beside=tuple(services[1:]))
        each = {"target": options.max_num_seqs, "diffusion": options.diffusion_rows}
        self._following = asyncio.create_task(_follow_replicas(self._service, each))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        # Serve's proxy puts the request id on every response, its own included.
        return create_app(self._service, self._keys, self._tracing, sets_request_id=False)

    async def reports(self) -> Sequence[ReplicaReport]:
        """Every live replica, for the process that started the service."""
        return await self._service.backend.reports()

    async def want_draft(self, path: str) -> None:
        """Have all draft replicas swap in another published draft."""
        await self._directory.want_draft.remote(path)

    async def drain(self, limit_s: float) -> None:
        """Refuse new requests and return when the running ones are answered, or have been told that they end here."""
        await asyncio.gather(*(service.drain(limit_s) for service in self._service.all))
        await asyncio.to_thread(self._tracing.close)


async def _follow_replicas(service: Service, each: Mapping[str, int]) -> None:
    """Admit what the live replicas can run, and no more: what waits here can be refused, moved and counted.

    Args:
        service: of all models.
        each: what one replica of a role runs at the same time.
    """
    while True:
        await asyncio.sleep(BEAT_S)
        try:
            reports = await service.backend.reports()
        except BackendUnavailableError:
            continue
        for served in service.all:
            alive = sum(report.role == served.role for report in reports)
            if alive:
                served.admission.resize(alive * each[served.role])


def build(args: Mapping[str, Any]) -> Application:
    """Entry point of Serve config files: see `parse_args` for the arguments.

    Raises:
        ConfigError: an argument at fault.
        CheckpointError: a target or draft that cannot be served; PairingError for two that do not belong together.
    """
    return build_application(parse_args(args))


def build_application(config: AppConfig) -> Application:
    """The application of a configuration. Raises as `build` does, before any replica is asked for."""
    config = _with_absolute_paths(config)
    _check(config)
    directory = serve.deployment(**directory_options(config))(Directory).bind()
    draft = None
    if config.serve.draft is not None:
        draft = serve.deployment(**draft_options(config))(Draft).bind(config, directory)
    target = None
    if config.serve.serves_target:
        target = serve.deployment(**target_options(config))(Target).bind(config, directory)
    diffusion = None
    if config.serve.diffusion is not None:
        # Its engine is imported only where there is a diffusion LM.
        from serve_app.diffusion import Diffusion

        diffusion = serve.deployment(**diffusion_options(config))(Diffusion).bind(config, directory)
    return serve.deployment(**ingress_options(config))(Ingress).bind(config, target, directory, draft, diffusion)


def _target_service(config: AppConfig, backend: Backend, admission: Admission, telemetry: Telemetry) -> Service:
    # Imported where the replica runs: the process that builds the application needs no tokenizer.
    from serve_app.tokenizer import ChatTokenizer
    from unmask.targets import resolve_target

    tokenizer = ChatTokenizer.load(resolve_target(config.target.model, config.target.revision))
    return Service(
        model=config.serve.name,
        max_model_len=config.target.max_model_len,
        created=int(time.time()),
        tokenizer=tokenizer,
        tools=_tool_parsers(config.serve.tool_parser, tokenizer),
        backend=backend,
        admission=admission,
        telemetry=telemetry,
        deadline_s=config.serve.request_timeout_s,
    )


def _tool_parsers(name: str | None, tokenizer: ChatTokenizer) -> ToolParsers | None:
    """The tool parser, if one is set. Raises ConfigError."""
    if name is None:
        return None
    # vLLM takes seconds to import; an ingress that parses no tool calls does without.
    from engines.tool_calls import ToolParsers

    return ToolParsers(name, tokenizer.hf)


def _diffusion_service(config: AppConfig, backend: Backend, admission: Admission, telemetry: Telemetry) -> Service:
    from serve_app.diffusion_library import library_shape
    from serve_app.diffusion_rules import DiffusionRules
    from serve_app.tokenizer import ChatTokenizer

    options = config.serve
    return Service(
        model=options.diffusion_name or options.name,
        max_model_len=options.diffusion_length,
        created=int(time.time()),
        tokenizer=ChatTokenizer.load(Path(options.diffusion or "")),
        backend=backend,
        admission=admission,
        telemetry=telemetry,
        deadline_s=options.request_timeout_s,
        diffusion=DiffusionRules(library_shape(options)),
    )


def _with_absolute_paths(config: AppConfig) -> AppConfig:
    """Replicas run in other folders than the process that builds the application."""
    options, target = config.serve, config.target
    options = replace(
        options,
        draft=_absolute(options.draft),
        diffusion=_absolute(options.diffusion),
        verifier=_absolute(options.verifier),
        api_keys_file=_absolute(options.api_keys_file),
        capture=_absolute(options.capture),
    )
    if Path(target.model).is_dir():
        target = replace(target, model=str(Path(target.model).absolute()))
    return replace(config, serve=options, target=target)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def _check(config: AppConfig) -> None:
    """Refuse what no replica could serve."""
    keys = config.serve.api_keys_file
    if keys is not None and not Path(keys).is_file():
        raise ConfigError(f"there is no file '{keys}'", field="serve.api_keys_file")
    if config.serve.diffusion is not None:
        _check_diffusion(config.serve)
    if config.serve.serves_target:
        _check_target(config)


def _check_diffusion(options: ServeConfig) -> None:
    from serve_app.diffusion_library import library_shape

    library_shape(options)
    if not (Path(options.diffusion or "") / "tokenizer.json").is_file():
        raise CheckpointError(f"'{options.diffusion}' has no tokenizer.json", field="serve.diffusion")


def _check_target(config: AppConfig) -> None:
    from unmask.targets import resolve_target

    target = resolve_target(config.target.model, config.target.revision)
    if config.serve.draft is None:
        return
    from unmask.checkpoints import check_pairing
    from unmask.targets import describe_target

    draft = check_pairing(config.serve.draft, describe_target(target))
    k = config.serve.num_speculative_tokens
    if k is not None and k > draft.block_size - 1:
        raise ConfigError(
            f"K = {k} exceeds the draft's block size - 1 = {draft.block_size - 1}",
            field="serve.num_speculative_tokens",
        )
