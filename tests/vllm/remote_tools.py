"""An engine with a remote draft in this process, what it proposes, and a draft that knows the text, for tests."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines.draft_arguments import LINK_FILE_VARIABLE, RemoteDraftOptions, with_remote_draft
from tests.vllm.vllm_tools import LAYER_IDS, K, engine, runner_of
from unmask.pairing.fleet import DraftFleet
from unmask.pairing.link_file import LinkConfig, write_link_file
from unmask.pairing.page_hashes import PAGE_SIZE
from unmask.pairing.server import DraftServer
from unmask.pairing.wire import Proposals, Step

SECRET = b"not for production: 0123456789ab"

Blocks = dict[tuple[int, int], list[int]]
"""Proposed ids by prompt length and anchor position."""


@dataclass
class Remote:
    """An engine with a remote draft."""

    llm: Any
    directory: Path
    servers: list[DraftServer] = field(default_factory=list)
    link_options: dict[str, Any] = field(default_factory=dict)

    @property
    def link(self) -> DraftFleet:
        return runner_of(self.llm).drafter._link

    def use(self, server: DraftServer) -> None:
        """Point the link at a server and wait until it is there."""
        self.servers.append(server)
        server.start()
        write_link(self.directory, server.address, **self.link_options)
        while not server.stats().connections:
            time.sleep(0.02)
        assert self.link.wait_until_ready(20)


def write_link(directory: Path, address: str | None, **options: Any) -> None:
    (directory / "secret").write_bytes(SECRET)
    secret = str(directory / "secret")
    config = LinkConfig(address=address, secret_file=secret, timeout_ms=30_000, retry_s=0.1, **options)
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

    def __init__(self, texts: list[list[int]], num_tokens: int) -> None:
        self.texts, self.num_tokens = texts, num_tokens
        self.pages: dict[int, list[torch.Tensor]] = {}
        self.num_shared = 0
        self.is_right = False
        self.rows: dict[int, list[torch.Tensor]] = {}
        self.of_request: dict[int, list[int]] = {}
        self.num_accepted: list[int] = []
        self.num_restarts = 0

    def step(self, batch: list[tuple[int, Step]]) -> list[Proposals]:
        return [self._answer(step) for _, step in batch]

    def _answer(self, step: Step) -> Proposals:
        tokens = np.zeros((len(step.rows), step.num_speculative_tokens), dtype=np.int32)
        counts = np.zeros(len(step.rows), dtype=np.uint8)
        features, page_hashes = iter(step.features.clone()), iter(step.page_hashes.tolist())
        for i, (request, start, num_features, last_token, num_hashes) in enumerate(step.rows.tolist()):
            held, hashes = self.rows.setdefault(request, []), [next(page_hashes) for _ in range(num_hashes)]
            if held and start < len(held):
                self.num_restarts += 1
                del held[start:]
            if not held and start:
                self.num_shared += start
                held += [row for value in hashes[: start // PAGE_SIZE] for row in self.pages[value]]
            assert start == len(held), "a gap"
            held += [next(features) for _ in range(num_features)]
            first = len(held) // PAGE_SIZE - num_hashes
            for page, value in enumerate(hashes, first):
                self.pages[value] = held[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            if last_token >= 0:
                tokens[i], counts[i] = self._propose(request, start, last_token, step.num_speculative_tokens)
        return Proposals(
            draft_version=step.draft_version, epoch=step.epoch, number=step.number, counts=counts, tokens=tokens
        )

    def _propose(self, request: int, start: int, last_token: int, k: int) -> tuple[np.ndarray, int]:
        anchor = len(self.rows[request])
        if request not in self.of_request:
            (self.of_request[request],) = [t for t in self.texts if len(t) == anchor + self.num_tokens]
        else:
            self.num_accepted.append(anchor - start - 1)
        text = self.of_request[request]
        if anchor >= len(text):
            # Drafts were accepted beyond the token limit; the scheduler cuts them off after this step.
            return np.zeros(k, dtype=np.int64), 0
        assert text[anchor] == last_token
        right = np.array((text[anchor + 1 : anchor + 1 + k] + [0] * k)[:k])
        wrong = np.arange(k) >= (k if self.is_right else anchor % (k + 1))
        return np.where(wrong, (right + 1) % 49152, right), k
