"""The asynchronous target engine with its draft in a process of its own, and what happens when that process ends."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from transformers import AutoTokenizer

from engines import core_process, target_engine
from engines.draft_arguments import RemoteDraftOptions
from engines.offline_engine import EngineDiedError
from engines.target_engine import TargetEngine, target_arguments
from tests.vllm.vllm_tools import LAYER_IDS, K, engine, greedy, make_draft, run_counted_core
from unmask.capture import ACCEPTED, REJECTED, Capture, read_captured
from unmask.checkpoints import load_draft
from unmask.config import TargetConfig
from unmask.decoding.speculative import speculative_decode
from unmask.errors import ConfigError, PromptError
from unmask.models.target import TargetModel
from unmask.pairing.link_file import LinkConfig, read_link_file, write_link_file
from unmask.targets import describe_target, resolve_target
from unmask.types import SamplingOptions, TokenDelta

CONFIG = TargetConfig(max_model_len=256, engine={"kv_cache_memory_bytes": 1 << 28})
TEXTS = ("The capital of France is", "Water boils at", "One, two, three,")
OPTIONS = SamplingOptions(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def target() -> Path:
    return resolve_target(CONFIG.model)


@pytest.fixture(scope="module")
def tokenizer(target: Path):
    return AutoTokenizer.from_pretrained(target)


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def plain_texts(target: Path, prompts: list[list[int]]) -> list[list[int]]:
    with engine(target) as llm:
        return greedy(llm, prompts, OPTIONS.max_tokens)


class DraftProcess:
    """A draft server of its own process, and the link file that leads to it."""

    def __init__(self, directory: Path, target: Path) -> None:
        self.link_file = directory / "link.json"
        self._directory = directory
        (directory / "secret").write_text("not for production: 0123456789ab")
        self._config = LinkConfig(
            address=None,
            secret_file=str(directory / "secret"),
            status_file=str(directory / "status"),
            timeout_ms=20_000,
            retry_s=0.2,
        )
        write_link_file(self.link_file, self._config)
        self.path = make_draft(target, directory / "draft")
        self._command = [sys.executable, "-m", "unmask.pairing.server"]
        self._command += ["--draft", str(self.path), "--target", str(target)]
        self._command += ["--secret-file", str(directory / "secret"), "--address-file", str(directory / "address")]
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        address_file = self._directory / "address"
        address_file.unlink(missing_ok=True)
        self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE)
        while not address_file.exists():
            assert self.process.poll() is None
            time.sleep(0.05)
        write_link_file(self.link_file, replace(self._config, address=read_link_file(address_file).address))

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process = None


@pytest.fixture(scope="module")
def draft(target: Path, plain_texts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DraftProcess]:
    draft = DraftProcess(tmp_path_factory.mktemp("d"), target)
    yield draft
    draft.kill()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pairing(draft: DraftProcess) -> AsyncIterator[TargetEngine]:
    options = RemoteDraftOptions(link_file=draft.link_file, layer_ids=LAYER_IDS, num_speculative_tokens=K)
    pairing = TargetEngine(CONFIG, dtype="float32", max_num_seqs=4, draft=options)
    await pairing.start()
    yield pairing
    await pairing.stop()
    assert not pairing.alive


async def until_linked(pairing: TargetEngine, value: float) -> None:
    for _ in range(600):
        if (pairing.link_status() or {}).get("speculation_enabled") == value:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the link did not change in time")


async def collect(pairing: TargetEngine, name: str, ids: list[int], options: SamplingOptions) -> list[TokenDelta]:
    return [delta async for delta in pairing.generate(name, ids, options)]


def ids_of(deltas: list[TokenDelta]) -> list[int]:
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    return [token for delta in deltas for token in delta.token_ids]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_draft_comes_goes_and_comes_back_without_changing_a_token(
    pairing: TargetEngine, draft: DraftProcess, prompts, plain_texts
) -> None:
    assert pairing.alive

    async def assert_plain_texts(run: str) -> None:
        streams = [collect(pairing, f"{run}-{i}", ids, OPTIONS) for i, ids in enumerate(prompts)]
        deltas = await asyncio.gather(*streams)
        assert [ids_of(d) for d in deltas] == plain_texts
        assert all(d[-1].finish_reason == "length" for d in deltas)

    await assert_plain_texts("without")
    assert pairing.stats().num_drafts == 0
    draft.start()
    await until_linked(pairing, 1)
    await assert_plain_texts("with")
    stats = pairing.stats()
    assert stats.num_drafts > 0
    assert stats.num_draft_tokens > stats.num_accepted_tokens == sum(stats.num_accepted_tokens_per_pos)
    assert len(stats.num_accepted_tokens_per_pos) == K
    status = pairing.link_status()
    assert status is not None
    assert status["proposed_tokens"] >= stats.num_draft_tokens

    stream = pairing.generate("interrupted", prompts[0], OPTIONS)
    received = (await anext(stream)).token_ids
    draft.kill()
    async for delta in stream:
        received += delta.token_ids
    assert received == plain_texts[0]
    await until_linked(pairing, 0)
    draft.start()
    await until_linked(pairing, 1)
    drafts = pairing.stats().num_drafts
    await assert_plain_texts("again")
    assert pairing.stats().num_drafts > drafts


@pytest.mark.parametrize(
    ("verifications", "emitted", "forwards"),
    [
        (None, 5, 5),
        (([], []), 1, 1),
        (([2, 3], [3, 3]), 8, 3),
        pytest.param(([2, 3], [3, 3]), 6, 3, id="the last block was accepted beyond the end"),
        pytest.param(([2, 3], [3, 3]), 9, 4, id="a step without proposals"),
    ],
)
def test_forwards_are_the_prompts_and_one_for_each_step(verifications, emitted: int, forwards: int) -> None:
    assert target_engine._num_forwards(verifications, emitted) == forwards


async def assert_captured(
    pairing: TargetEngine, draft: DraftProcess, target: Path, prompts, plain_texts, folder: Path
) -> None:
    """What is captured of finished requests is what the plain loop counts."""
    capture = Capture(folder, describe_target(target), max_bytes=2**20, flush_s=60)

    async def ask(name: str, ids: list[int], options: SamplingOptions) -> None:
        async with aclosing(pairing.generate(name, ids, options, capture.add)) as deltas:
            async for _ in deltas:
                if name == "closed":
                    return

    await asyncio.gather(*(ask(f"captured-{i}", ids, OPTIONS) for i, ids in enumerate(prompts)))
    await ask("closed", prompts[0], replace(OPTIONS, max_tokens=200))
    capture.stop()
    rows = {tuple(row.prompt_ids): row for row in read_captured(folder)}
    assert capture.stats.written == len(rows) == len(prompts)
    loaded = load_draft(draft.path)
    loop = TargetModel.load(target, loaded.config.target_layer_ids)
    for ids, text in zip(prompts, plain_texts, strict=True):
        row = rows[tuple(ids)]
        expected = speculative_decode(loop, loaded, ids, OPTIONS, num_speculative_tokens=K, eos_ids=frozenset())
        assert (row.response_ids, row.finish_reason) == (text, "length") == (expected.token_ids, "length")
        assert row.meta[ACCEPTED] == expected.accepted
        assert row.num_forwards == len(expected.accepted) + 1
        anchors = itertools.accumulate((a + 1 for a in expected.accepted), initial=0)
        rejected = [s for s, a in zip(anchors, expected.accepted, strict=False) if a < K and s < len(text) - 1]
        assert row.meta[REJECTED] == rejected


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
async def test_finished_requests_are_captured_as_the_plain_loop_counts_them(
    pairing: TargetEngine, draft: DraftProcess, target: Path, prompts, plain_texts, tmp_path: Path
) -> None:
    if draft.process is None:
        draft.start()
    await until_linked(pairing, 1)
    await assert_captured(pairing, draft, target, prompts, plain_texts, tmp_path)


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
async def test_requests_are_captured_where_vllm_does_not_tell_how_they_were_verified(
    draft: DraftProcess, target: Path, prompts, plain_texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_engine, "told_by_vllm", lambda: False)
    monkeypatch.setattr(core_process, "_run_tied", run_counted_core)
    options = RemoteDraftOptions(link_file=draft.link_file, layer_ids=LAYER_IDS, num_speculative_tokens=K)
    pairing = TargetEngine(CONFIG, dtype="float32", max_num_seqs=4, draft=options)
    draft.kill()
    draft.start()
    await pairing.start()
    try:
        await until_linked(pairing, 1)
        await assert_captured(pairing, draft, target, prompts, plain_texts, tmp_path)
    finally:
        await pairing.stop()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_closed_stream_is_aborted(pairing: TargetEngine, prompts) -> None:
    options = replace(OPTIONS, max_tokens=200)
    stream = pairing.generate("closed", prompts[0], options)
    await anext(stream)
    await stream.aclose()
    task = asyncio.create_task(collect(pairing, "cancelled", prompts[1], options))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await collect(pairing, "last", prompts[2], replace(OPTIONS, max_tokens=4))
    assert pairing.stats().num_running <= 1


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
async def test_options_reach_the_engine(pairing: TargetEngine, tokenizer, prompts, plain_texts) -> None:
    deltas = await collect(pairing, "logprobs", prompts[0], replace(OPTIONS, max_tokens=4, logprobs=2))
    logprobs = [entry for delta in deltas for entry in delta.logprobs or []]
    assert [max(entry, key=entry.__getitem__) for entry in logprobs] == plain_texts[0][:4]
    assert all(len(entry) >= 2 and max(entry.values()) <= 0 for entry in logprobs)

    stop = plain_texts[0][2]
    deltas = await collect(pairing, "stop", prompts[0], replace(OPTIONS, stop_token_ids=(stop,)))
    assert deltas[-1].finish_reason == "stop"
    assert ids_of(deltas) == plain_texts[0][: plain_texts[0].index(stop) + 1]

    seeded = replace(OPTIONS, temperature=1.0, seed=7)
    first, second = [ids_of(await collect(pairing, f"seed{i}", prompts[0], seeded)) for i in range(2)]
    assert first == second != plain_texts[0]

    schema = json.dumps({"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]})
    options = SamplingOptions(max_tokens=40, json_schema=schema)
    deltas = await collect(pairing, "json", prompts[0], options)
    assert json.loads(tokenizer.decode(ids_of(deltas), skip_special_tokens=True))["n"] in (1, 2)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_prompt_that_does_not_fit_is_refused(pairing: TargetEngine) -> None:
    with pytest.raises(PromptError, match="refuses"):
        await collect(pairing, "long", [5] * 300, OPTIONS)
    with pytest.raises(PromptError, match="refuses"):
        await collect(pairing, "schema", [5], replace(OPTIONS, json_schema="{"))
    assert pairing.alive


@pytest.mark.asyncio(loop_scope="module")
async def test_a_stopped_engine_ends_its_requests(pairing: TargetEngine, prompts, caplog) -> None:
    running = asyncio.create_task(collect(pairing, "running", prompts[0], replace(OPTIONS, max_tokens=200)))
    await asyncio.sleep(0.3)
    await pairing.stop()
    for task in (running, collect(pairing, "late", prompts[0], OPTIONS)):
        with pytest.raises(EngineDiedError):
            await task
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("option", [{"speculative_config": {}}, {"async_scheduling": True}])
def test_options_against_the_draft_are_refused(option: dict, tmp_path: Path) -> None:
    draft = RemoteDraftOptions(link_file=tmp_path / "l", layer_ids=LAYER_IDS, num_speculative_tokens=K)
    config = replace(CONFIG, engine=option)
    with pytest.raises(ConfigError, match=next(iter(option))):
        target_arguments(config, tmp_path, dtype="auto", max_num_seqs=1, on_gpu=False, draft=draft)
