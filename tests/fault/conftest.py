"""A private Ray with a service on it: two replicas of a tiny target in vLLM, and their draft."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.cluster import SERVE_ENVIRONMENT
from tests.fault.load import Load, undisturbed
from tests.fault.scenario import MARK, Stage

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.fault.tiny import save_tiny_target

    return save_tiny_target(tmp_path_factory.mktemp("t") / "target")


@pytest.fixture(scope="session")
def draft_dir(target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.fault.tiny import save_tiny_draft

    return save_tiny_draft(target_dir, tmp_path_factory.mktemp("d") / "draft")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.update(SERVE_ENVIRONMENT)
    # Other work on this machine may fill its memory; that shall not end replicas under test.
    os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112 - Ray spells it so
    os.environ[MARK] = str(os.getpid())
    import ray

    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: str(os.getpid())}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def stage(ray_cluster: None, target_dir: Path, draft_dir: Path) -> Iterator[Stage]:
    from serve_app.handle import serve_pairing
    from tests.fault.tiny import tiny_recipe

    handle = serve_pairing(tiny_recipe(target_dir, draft_dir))
    yield Stage(service=handle, draft=draft_dir)
    handle.shutdown()


@pytest.fixture(scope="session")
def expected(stage: Stage) -> dict[str, tuple[str, int]]:
    """The undisturbed greedy answers."""
    return undisturbed(stage.service.url, Load())
