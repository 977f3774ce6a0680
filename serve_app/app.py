"""The application: an HTTP ingress, target replicas, draft replicas and the directory that introduces them.

`serve deploy serve_app/config.yaml` builds it on a cluster from `build`; `serve_pairing` runs it from a process that
has joined one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from serve_app.admission import Admission
from serve_app.auth import KeyFile
from serve_app.backend import ReplicaReport
from serve_app.directory import Directory
from serve_app.draft import Draft
from serve_app.ingress import create_app
from serve_app.replica_log import join_replica_log
from serve_app.replicas import ReplicaBackend
from serve_app.service import Service
from serve_app.settings import (
    AppConfig,
    directory_options,
    draft_options,
    ingress_options,
    parse_args,
    target_options,
)
from serve_app.target import Target
from serve_app.telemetry import Telemetry
from unmask.errors import ConfigError

logger = logging.getLogger(__name__)


@serve.ingress()
class Ingress:
    """The HTTP application over the target replicas.

    Raises:
        CheckpointError: the target's tokenizer cannot be read.
    """

    async def __init__(
        self, config: AppConfig, target: DeploymentHandle, directory: DeploymentHandle, draft: DeploymentHandle | None
    ) -> None:
        # Imported where the replica runs: the process that builds the application needs no tokenizer.
        from serve_app.tokenizer import ChatTokenizer
        from unmask.targets import resolve_target

        join_replica_log()
        self._draft = draft  # held so that Serve deploys it with the application
        options = config.serve
        admission = Admission(config.slots, options.max_queued)
        telemetry = Telemetry(admission)
        self._keys = KeyFile(Path(options.api_keys_file)) if options.api_keys_file else None
        self._service = Service(
            model=options.name,
            max_model_len=config.target.max_model_len,
            created=int(time.time()),
            tokenizer=ChatTokenizer.load(resolve_target(config.target.model, config.target.revision)),
            backend=ReplicaBackend(target, directory, telemetry.resumed.inc),
            admission=admission,
            telemetry=telemetry,
            deadline_s=options.request_timeout_s,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        # Serve's proxy puts the request id on every response, its own included.
        return create_app(self._service, self._keys, sets_request_id=False)

    async def reports(self) -> Sequence[ReplicaReport]:
        """Every live replica, for the process that started the service."""
        return await self._service.backend.reports()

    async def drain(self) -> None:
        """Refuse new requests and return when the running ones are done."""
        await self._service.admission.drain()


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
    directory = serve.deployment(**directory_options())(Directory).bind()
    draft = None
    if config.serve.draft is not None:
        draft = serve.deployment(**draft_options(config))(Draft).bind(config, directory)
    target = serve.deployment(**target_options(config))(Target).bind(config, directory)
    return serve.deployment(**ingress_options(config))(Ingress).bind(config, target, directory, draft)


def _with_absolute_paths(config: AppConfig) -> AppConfig:
    """Replicas run in other folders than the process that builds the application."""
    options, target = config.serve, config.target
    options = replace(options, draft=_absolute(options.draft), api_keys_file=_absolute(options.api_keys_file))
    if Path(target.model).is_dir():
        target = replace(target, model=str(Path(target.model).absolute()))
    return replace(config, serve=options, target=target)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def _check(config: AppConfig) -> None:
    """Refuse what no replica could serve."""
    from unmask.targets import resolve_target

    target = resolve_target(config.target.model, config.target.revision)
    keys = config.serve.api_keys_file
    if keys is not None and not Path(keys).is_file():
        raise ConfigError(f"there is no file '{keys}'", field="serve.api_keys_file")
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
