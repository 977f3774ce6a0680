"""The Ray cluster that a pipeline runs on: a running one, or a private one on this machine."""

from __future__ import annotations

import atexit
import math
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
from pathlib import Path

from unmask.errors import ConfigError, UserError

RAY_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.proxy.middlewares",
    # A replica that does not answer has nothing to drain, and its requests wait for its end.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # What a killed replica had started goes with it: all of it, at once, and not the engine alone.
    "RAY_process_group_cleanup_enabled": "1",
    # Ray's workers would stand behind every other process of the machine, which a request waits for.
    "RAY_worker_niceness": "0",
    # All that replicas do is asynchronous: a second thread only takes the interpreter from the first.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # What was imported is no garbage: to look through it holds every stream up.
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
}
"""What Ray's own processes must be started with, which no option can say: give it to `ray start`."""

_PRINTED_USER_ERROR = re.compile(r"^unmask\.errors\.\w+: (.+)$", re.MULTILINE)
_WRAPPING = re.compile(
    r"^(?:The above exception was the direct cause of|Failed to [^\n]+ after \d+/\d+ attempts ).*",
    re.MULTILINE | re.DOTALL,
)
"""What Ray Data puts behind an error: that it came from a function, how often it tried, and which options say so."""


class FaultError(RuntimeError):
    """A run that failed although nothing in the recipe is wrong: engines or nodes died beyond the retries."""


def connect(*, num_cpus: float = 1, num_gpus: float = 0) -> None:
    """Join the cluster named by `RAY_ADDRESS`, or start a private one; do nothing inside an initialised Ray.

    A private cluster demands a token of its own, keeps its files in a short-named folder that goes when the
    process ends, and counts at least `num_cpus` CPUs, so that a pipeline runs on any machine. A handler of SIGTERM
    that the caller has set stays in place.

    Args:
        num_cpus: CPUs that the pipeline needs at the same time.
        num_gpus: GPUs that it needs; a private cluster cannot make them up.

    Raises:
        ConfigError: this machine has too few GPUs.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address and _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if ray.is_initialized():
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        _start_private(max(os.cpu_count() or 1, math.ceil(num_cpus)))
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        # Ray's own ends a private cluster under the work, which then fails instead of being stopped.
        signal.signal(signal.SIGTERM, on_sigterm)
    if not address and num_gpus > (available := ray.cluster_resources().get("GPU", 0)):
        raise ConfigError(
            f"the recipe asks for {num_gpus:g} GPUs and this machine has {available:g}; "
            "set RAY_ADDRESS to a cluster, or ask for less"
        )


def explain(error: BaseException) -> UserError | FaultError:
    """What to tell the user of an error that came back through Ray: their mistake if it was one, else the fault."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    # Of an actor that failed to start Ray keeps only the printed traceback.
    if printed := _PRINTED_USER_ERROR.findall(str(error)):
        return UserError(printed[-1])
    lines = _WRAPPING.sub("", str(error)).splitlines()
    last_line = next((line for line in reversed(lines) if line.strip()), type(error).__name__)
    return FaultError(last_line.strip())


def _has_token() -> bool:
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    return bool(named) or (Path.home() / ".ray" / "auth_token").is_file()


def _start_private(num_cpus: int) -> None:
    import ray

    # Ray turns token authentication on for a cluster that it starts here, and would leave a readable token file.
    if not _has_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    folder = tempfile.mkdtemp(prefix="unmask-")
    atexit.register(_end_private, folder)
    ray.init(
        address="local",
        num_cpus=num_cpus,
        dashboard_host="127.0.0.1",
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
        log_to_driver=False,
        configure_logging=False,
    )


def _end_private(folder: str) -> None:
    import ray

    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
