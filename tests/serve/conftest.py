"""A private Ray with the service on it: the embedded target in vLLM, and a random draft."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from tests.private_ray import start_private_ray, use_direct_ingress
from tests.trace_collector import Collector

K = 5

DIRECT = "UNMASK_TEST_DIRECT_INGRESS"
"""Set, the service is asked through its ingress replica's own port, past Serve's proxy."""


@pytest.fixture(scope="session")
def draft_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random draft of the embedded target: nearly nothing that it proposes is accepted."""
    return _draft(tmp_path_factory.mktemp("d") / "draft", seed=0)


@pytest.fixture(scope="session")
def another_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another draft of the same target."""
    return _draft(tmp_path_factory.mktemp("d") / "another", seed=1)


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft of another target."""
    return _draft(tmp_path_factory.mktemp("d") / "stranger", seed=2, revision="sha256:of-another-target")


def _draft(path: Path, seed: int, **changes: str) -> Path:
    from unmask.checkpoints import save_draft
    from unmask.config import EMBEDDED_TARGET
    from unmask.models.dflash import DFlashConfig, DFlashDraft, spread_layer_ids
    from unmask.targets import describe_target, resolve_target

    config = DFlashConfig(
        hidden_size=576,
        intermediate_size=768,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_position_embeddings=2048,
        block_size=K + 1,
        mask_token_id=16,
        num_target_layers=30,
        target_layer_ids=spread_layer_ids(30, 3),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    torch.manual_seed(seed)
    save_draft(DFlashDraft(config), path, replace(describe_target(resolve_target(EMBEDDED_TARGET)), **changes))
    return path


@pytest.fixture(scope="session")
def ray_cluster(direct_url: str | None) -> Iterator[None]:
    import ray

    start_private_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def direct_url() -> str | None:
    """Where the ingress replica listens itself, if it does."""
    return use_direct_ingress() if DIRECT in os.environ else None


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def service(ray_cluster: None, direct_url: str | None, draft_dir: Path, collector: Collector):
    from serve_app.handle import serve_pairing
    from unmask.config import GenerateConfig, Recipe, ServeConfig, TargetConfig

    handle = serve_pairing(
        Recipe(
            target=TargetConfig(max_model_len=256),
            generate=GenerateConfig(max_new_tokens=64),
            serve=ServeConfig(
                port=0,
                draft=str(draft_dir),
                dtype="float32",
                max_num_seqs=4,
                max_queued=4,
                traces_endpoint=collector.url,
            ),
        )
    )
    yield replace(handle, url=direct_url or handle.url)
    handle.shutdown()


@pytest.fixture(scope="module")
def client(service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=120) as client:
        yield client
