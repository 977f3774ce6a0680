"""Two targets with one draft, a draft replaced under load, one target with two drafts. In float32."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from engines.draft_arguments import RemoteDraftOptions
from engines.target_engine import TargetEngine
from tests.vllm.remote_tools import SECRET, remote_engine, write_link
from tests.vllm.vllm_tools import LAYER_IDS, K, engine, greedy, make_draft
from unmask.checkpoints import load_draft
from unmask.config import TargetConfig
from unmask.pairing.hello import draft_version
from unmask.pairing.link_file import LinkConfig, write_link_file
from unmask.pairing.replacement import replace_draft
from unmask.pairing.server import DraftServer
from unmask.pairing.vocabulary import load_vocabulary
from unmask.targets import describe_target, resolve_target
from unmask.types import SamplingOptions

CONFIG = TargetConfig(
    max_model_len=256, engine={"kv_cache_memory_bytes": 1 << 28, "enable_prefix_caching": True, "block_size": 32}
)
TEXTS = ("The capital of France is", "Water boils at", "One, two, three,", "A lighthouse keeper must")
REPEATS = 12
"""Prompts are longer than a block of the target's cache."""
OPTIONS = SamplingOptions(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def target() -> Path:
    return resolve_target(CONFIG.model)


@pytest.fixture(scope="module")
def drafts(target: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two published drafts of the target."""
    folder = tmp_path_factory.mktemp("d")
    return [make_draft(target, folder / f"draft{i}", seed=i, record=describe_target(target)) for i in range(2)]


@pytest.fixture(scope="module")
def prompts(target: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(target)
    return [tokenizer(REPEATS * text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def plain_texts(target: Path, prompts: list[list[int]]) -> list[list[int]]:
    with engine(target) as llm:
        return greedy(llm, prompts, OPTIONS.max_tokens)


@pytest.fixture
def serve(target: Path, drafts: list[Path]) -> Iterator[Callable[[], DraftServer]]:
    vocabulary, servers = load_vocabulary(target, torch.float32), []

    def start() -> DraftServer:
        servers.append(DraftServer(load_draft(drafts[0]), *vocabulary, SECRET, record=describe_target(target)))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@asynccontextmanager
async def targets(folder: Path, count: int) -> AsyncIterator[list[TargetEngine]]:
    """Engines in processes of their own; number i follows the link file of folder i."""
    engines = []
    for i in range(count):
        (folder / str(i)).mkdir()
        point(folder / str(i))
        draft = RemoteDraftOptions(
            link_file=folder / str(i) / "link.json", layer_ids=LAYER_IDS, num_speculative_tokens=K
        )
        engines.append(TargetEngine(CONFIG, dtype="float32", max_num_seqs=4, draft=draft))
        await engines[-1].start()
    yield engines
    for one in engines:
        await one.stop()


def point(folder: Path, *servers: DraftServer) -> None:
    """Name the drafts of one target."""
    (folder / "secret").write_bytes(SECRET)
    addresses = [server.address for server in servers]
    config = LinkConfig(
        address=addresses[0] if addresses else None,
        further_addresses=tuple(addresses[1:]),
        secret_file=str(folder / "secret"),
        status_file=str(folder / "status"),
        timeout_ms=20_000,
        retry_s=0.2,
    )
    write_link_file(folder / "link.json", config)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("did not happen in time")


def status_of(one: TargetEngine, name: str) -> float:
    return (one.link_status() or {}).get(name, 0)


async def texts_of(one: TargetEngine, run: str, prompts: list[list[int]]) -> list[list[int]]:
    async def text(name: str, ids: list[int]) -> list[int]:
        return [token async for delta in one.generate(name, ids, OPTIONS) for token in delta.token_ids]

    return await asyncio.gather(*(text(f"{run}-{i}", ids) for i, ids in enumerate(prompts)))


@pytest.mark.slow
def test_requests_move_when_one_of_two_drafts_goes(target: Path, serve, prompts, tmp_path: Path) -> None:
    with remote_engine(target, tmp_path, max_num_batched_tokens=256) as remote:
        plain = greedy(remote.llm, prompts, OPTIONS.max_tokens)
        servers = [serve(), serve()]
        write_link(tmp_path, servers[0].address, further_addresses=(servers[1].address,))
        while remote.link.status["drafts_connected"] < 2:
            time.sleep(0.02)
        assert greedy(remote.llm, prompts, OPTIONS.max_tokens) == plain
        proposals = [server.stats().proposals for server in servers]
        assert min(proposals) > 10
        servers[0].stop()
        assert greedy(remote.llm, prompts, OPTIONS.max_tokens) == plain
        assert servers[1].stats().proposals - proposals[1] > proposals[1]


@pytest.mark.slow
@pytest.mark.asyncio
async def test_two_targets_share_a_draft_that_is_replaced_and_doubled(
    target: Path, drafts, serve, prompts, plain_texts, tmp_path: Path
) -> None:
    server = serve()
    async with targets(tmp_path, 2) as engines:
        for i in range(2):
            point(tmp_path / str(i), server)
        await until(lambda: all(status_of(one, "speculation_enabled") for one in engines))
        assert server.stats().connections == 2
        runs = [texts_of(one, "shared", prompts) for one in engines]
        assert await asyncio.gather(*runs) == [plain_texts] * 2
        assert all(status_of(one, "proposals") > 20 for one in engines)

        # Replaced while both targets generate.
        before = [status_of(one, "steps") for one in engines]
        runs = [asyncio.create_task(texts_of(one, "replaced", prompts)) for one in engines]
        await until(lambda: all(status_of(one, "steps") > b for one, b in zip(engines, before, strict=True)))
        version = await asyncio.to_thread(replace_draft, server, drafts[1], describe_target(target))
        assert await asyncio.gather(*runs) == [plain_texts] * 2
        assert version == server.stats().draft_version == draft_version(load_draft(drafts[1]))
        await until(lambda: all(status_of(one, "draft_version") == version % 2**53 for one in engines))
        gaps, idle = server.stats().proposals_with_gap, server.stats().idle_pages
        for run in ("after", "after, from the cache"):
            assert [await texts_of(one, run, prompts) for one in engines] == [plain_texts] * 2
        # What the targets had cached for the old draft was not used with the new one, what they have cached since is.
        assert server.stats().proposals_with_gap == gaps
        assert server.stats().idle_pages > idle
        assert [status_of(one, "failures") for one in engines] == [0, 0]
        assert [status_of(one, "epoch") for one in engines] == [2, 2]

        # A second draft for the first target; then its first one goes in mid-stream.
        second = serve()
        point(tmp_path / "0", server, second)
        await until(lambda: status_of(engines[0], "drafts_connected") == 2)
        assert await texts_of(engines[0], "both", prompts) == plain_texts
        assert second.stats().proposals > 10
        proposals = second.stats().proposals
        run = asyncio.create_task(texts_of(engines[0], "one gone", prompts))
        await until(lambda: second.stats().proposals > proposals)
        server.stop()
        assert await run == plain_texts
        await until(lambda: status_of(engines[0], "drafts_connected") == 1)
        proposals = second.stats().proposals
        assert await texts_of(engines[0], "moved", prompts) == plain_texts
        assert second.stats().proposals >= proposals + 4 * (OPTIONS.max_tokens // (K + 1))
