"""A private Ray with a service on it: two replicas of a tiny target in vLLM, and their draft."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.load import Load, undisturbed
from tests.fault.scenario import Stage
from tests.fault.small_disk import small_disk
from tests.private_ray import start_private_ray

__all__ = ["small_disk"]


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
    import ray

    start_private_ray()
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
