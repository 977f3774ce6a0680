"""The private Ray of the fault tests; in a directory of its own, since it is another service that runs on it."""

from __future__ import annotations

from tests.fault.conftest import ray_cluster

__all__ = ["ray_cluster"]
