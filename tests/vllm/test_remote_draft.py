"""The remote draft against vLLM's own `dflash` method, transformers, and a target without a draft. In float32."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engines.draft_arguments import LINK_FILE_VARIABLE, RemoteDraftOptions, with_remote_draft
from tests.vllm.vllm_tools import LAYER_IDS, MAX_MODEL_LEN, K, engine, greedy, make_draft, runner_of
from unmask.checkpoints import load_draft
from unmask.config import EMBEDDED_TARGET
from unmask.pairing.client import DraftLink
from unmask.pairing.link_file import LinkConfig, write_link_file
from unmask.pairing.projection import Projection
from unmask.pairing.server import DraftServer
from unmask.pairing.vocabulary import load_vocabulary
from unmask.pairing.wire import Proposals, Step
from unmask.targets import resolve_target

NUM_TOKENS = 24
SECRET = b"not for production: 0123456789ab"
TEXT = (
    "The history of the lighthouse begins with fires on hilltops. As ports grew, towers were raised so that the "
    "light could be seen from farther away, and keepers were paid to tend it through the night. "
) * 8
PROMPT_LENGTHS = (MAX_MODEL_LEN - NUM_TOKENS - 1, 3, 17, 40, 75, 90)
"""All different: they tell requests apart. The long ones are cut into chunks, the first ends at the length limit."""

Blocks = dict[tuple[int, int], list[int]]
"""Proposed ids by prompt length and anchor position."""


@dataclass
class Remote:
    """An engine with a remote draft."""

    llm: Any
    directory: Path
    servers: list[DraftServer] = field(default_factory=list)

    @property
    def link(self) -> DraftLink:
        return runner_of(self.llm).drafter._link

    def use(self, server: DraftServer) -> None:
        """Point the link at a server and wait until it is there."""
        self.servers.append(server)
        server.start()
        write_link(self.directory, server.address)
        while not server.stats().connections:
            time.sleep(0.02)
        assert self.link.wait_until_ready(20)


def write_link(directory: Path, address: str | None) -> None:
    (directory / "secret").write_bytes(SECRET)
    config = LinkConfig(address=address, secret_file=str(directory / "secret"), timeout_ms=30_000, retry_s=0.1)
    write_link_file(directory / "link.json", config)


@contextmanager
def remote_engine(target: Path, directory: Path, **options: Any) -> Iterator[Remote]:
    write_link(directory, None)
    os.environ[LINK_FILE_VARIABLE] = str(directory / "link.json")
    draft = RemoteDraftOptions(link_file=directory / "link.json", layer_ids=LAYER_IDS, num_speculative_tokens=K)
    with engine(target, **with_remote_draft(options, draft)) as llm:
        remote = Remote(llm, directory)
        yield remote
        remote.link.close()
        for server in remote.servers:
            server.stop()


@pytest.fixture(scope="module")
def target() -> Path:
    return resolve_target(EMBEDDED_TARGET)


@pytest.fixture(scope="module")
def draft_dir(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_draft(target, tmp_path_factory.mktemp("d") / "draft")


@pytest.fixture(scope="module")
def new_server(target: Path, draft_dir: Path) -> Callable[[], DraftServer]:
    vocabulary = load_vocabulary(target, torch.float32)
    return lambda: DraftServer(load_draft(draft_dir), *vocabulary, SECRET)


@pytest.fixture(scope="module")
def prompts(target: Path) -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(target)(TEXT)["input_ids"]
    return [ids[3 * i : 3 * i + length] for i, length in enumerate(PROMPT_LENGTHS)]


@pytest.fixture(scope="module")
def plain_texts(target: Path, prompts: list[list[int]]) -> list[list[int]]:
    with engine(target) as llm:
        return greedy(llm, prompts, NUM_TOKENS)


@pytest.fixture(scope="module")
def native_blocks(target: Path, draft_dir: Path, prompts: list[list[int]], plain_texts: list[list[int]]) -> Blocks:
    native = {"method": "dflash", "model": str(draft_dir), "num_speculative_tokens": K}
    with engine(target, speculative_config=native) as llm, recorded_blocks(llm) as blocks:
        # Without the first prompt: while one request is within K tokens of the length limit, vLLM skips its own draft
        # for the whole batch, and the other requests' later blocks are drafted from a context with holes.
        assert greedy(llm, prompts[1:], NUM_TOKENS) == plain_texts[1:]
    return blocks


@pytest.fixture(scope="module")
def remote(target: Path, native_blocks: Blocks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    with remote_engine(target, tmp_path_factory.mktemp("l")) as remote:
        yield remote


@contextmanager
def recorded_blocks(llm: Any) -> Iterator[Blocks]:
    """What the runner's drafter proposes at every anchor, reckoned from the runner's own state."""
    runner = runner_of(llm)
    method = runner.propose_draft_token_ids
    blocks: Blocks = {}

    def record(scheduler_output: Any, sampled: Any, *rest: Any) -> Any:
        proposed = method(scheduler_output, sampled, *rest)
        batch, drafted = runner.input_batch, rest[4]
        for i, name in enumerate(batch.req_ids):
            reached = int(batch.num_computed_tokens_cpu[i]) + scheduler_output.num_scheduled_tokens[name]
            prompt_length = int(batch.num_prompt_tokens[i])
            num_drafted = drafted.num_draft_tokens[i] if drafted is not None else 0
            gained = sum(int(token) >= 0 for token in sampled[i])
            anchor = reached - (num_drafted + 1 - gained if num_drafted else 0)
            if anchor >= prompt_length:
                blocks[prompt_length, anchor] = [int(token) for token in proposed[i]]
        return proposed

    runner.propose_draft_token_ids = record
    yield blocks
    del runner.propose_draft_token_ids


class LookupDraft:
    """Takes the place of an engine's `step`: keeps the features that arrive, proposes the known text with mistakes.

    The block for anchor p is right up to p % (K + 1) tokens, so that every number of drafts is accepted at times.
    """

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts
        self.rows: dict[int, list[torch.Tensor]] = {}
        self.of_request: dict[int, list[int]] = {}
        self.num_accepted: list[int] = []
        self.num_restarts = 0

    def step(self, batch: list[tuple[int, Step]]) -> list[Proposals]:
        return [self._answer(step) for _, step in batch]

    def _answer(self, step: Step) -> Proposals:
        tokens = np.zeros((len(step.rows), step.num_speculative_tokens), dtype=np.int32)
        counts = np.zeros(len(step.rows), dtype=np.uint8)
        features = iter(step.features.clone())
        for i, (request, start, num_features, last_token) in enumerate(step.rows.tolist()):
            held = self.rows.setdefault(request, [])
            if start == 0 and held:
                self.num_restarts += 1
                held.clear()
            assert start == len(held), "a gap"
            held += [next(features) for _ in range(num_features)]
            if last_token >= 0:
                tokens[i], counts[i] = self._propose(request, start, last_token, step.num_speculative_tokens)
        return Proposals(
            draft_version=step.draft_version, epoch=step.epoch, number=step.number, counts=counts, tokens=tokens
        )

    def _propose(self, request: int, start: int, last_token: int, k: int) -> tuple[np.ndarray, int]:
        anchor = len(self.rows[request])
        if request not in self.of_request:
            (self.of_request[request],) = [t for t in self.texts if len(t) == anchor + NUM_TOKENS]
        else:
            self.num_accepted.append(anchor - start - 1)
        text = self.of_request[request]
        if anchor >= len(text):
            # Drafts were accepted beyond the token limit; the scheduler cuts them off after this step.
            return np.zeros(k, dtype=np.int64), 0
        assert text[anchor] == last_token
        right = np.array((text[anchor + 1 : anchor + 1 + k] + [0] * k)[:k])
        wrong = np.arange(k) >= anchor % (k + 1)
        return np.where(wrong, (right + 1) % 49152, right), k


def test_preempted_requests_start_over(target: Path, new_server, prompts, plain_texts, tmp_path: Path) -> None:
    lookup = LookupDraft([p + t for p, t in zip(prompts[1:], plain_texts[1:], strict=True)])
    with remote_engine(target, tmp_path, max_model_len=128, block_size=32, num_gpu_blocks_override=8) as small:
        server = new_server()
        server._engine.step = lookup.step
        small.use(server)
        assert greedy(small.llm, prompts[1:], NUM_TOKENS) == plain_texts[1:]
        assert small.link.status["failures"] == 0
    assert lookup.num_restarts > 0


def test_every_block_equals_native_dflash(
    remote: Remote, new_server, prompts, plain_texts, native_blocks: Blocks, tmp_path: Path
) -> None:
    server = new_server()
    remote.use(server)
    with recorded_blocks(remote.llm) as blocks:
        assert greedy(remote.llm, prompts, NUM_TOKENS) == plain_texts
    for name, found in (("native", native_blocks), ("remote", blocks)):
        lines = [json.dumps([*key, *ids]) for key, ids in sorted(found.items())]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    assert {key: ids for key, ids in blocks.items() if key[0] != PROMPT_LENGTHS[0]} == native_blocks
    assert max(anchor for _, anchor in blocks) > MAX_MODEL_LEN - K
    assert len({tuple(ids) for ids in blocks.values()}) > 20
    assert server.stats().proposals == len(blocks)


def test_shipped_features_equal_transformers(
    remote: Remote, new_server, prompts, plain_texts, draft_dir, target
) -> None:
    server, texts = new_server(), [p + t for p, t in zip(prompts, plain_texts, strict=True)]
    lookup = LookupDraft(texts)
    server._engine.step = lookup.step
    remote.use(server)
    assert greedy(remote.llm, prompts, NUM_TOKENS) == plain_texts
    assert set(lookup.num_accepted) == set(range(K + 1))
    assert lookup.num_restarts == 0
    assert remote.link.status["failures"] == 0

    projection = Projection.of(load_draft(draft_dir))
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert len(lookup.of_request) == len(prompts)
    for request, text in lookup.of_request.items():
        with torch.no_grad():
            states = model(torch.tensor([text]), output_hidden_states=True).hidden_states
        expected = projection(torch.cat([states[layer + 1][0] for layer in LAYER_IDS], dim=-1))
        shipped = torch.stack(lookup.rows[request])[: len(text)]
        assert len(shipped) >= len(text) - K - 1
        error = (shipped - expected[: len(shipped)]).norm(dim=-1) / expected[: len(shipped)].norm(dim=-1)
        assert error.max() < 1e-4


def test_a_draft_that_is_gone_changes_no_token(remote: Remote, new_server, prompts, plain_texts) -> None:
    server = new_server()
    remote.use(server)
    step, calls = server._engine.step, []

    def die_in_the_tenth_step(batch: list) -> list:
        calls.append(batch)
        if len(calls) == 10:
            server._hang_up()
        return step(batch)

    server._engine.step = die_in_the_tenth_step
    failures = remote.link.status["failures"]
    assert greedy(remote.llm, prompts, NUM_TOKENS) == plain_texts
    assert len(calls) == 10
    assert remote.link.status["failures"] == failures + 1
    remote.use(new_server())
    proposals = remote.link.status["proposals"]
    assert greedy(remote.llm, prompts[:2], 4) == [text[:4] for text in plain_texts[:2]]
    assert remote.link.status["proposals"] > proposals
