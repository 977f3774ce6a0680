"""K chosen step by step: other numbers of proposals, the same text. In float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.vllm.remote_tools import SECRET, LookupDraft, remote_engine
from tests.vllm.vllm_tools import K, engine, greedy, make_draft
from unmask.checkpoints import load_draft
from unmask.config import EMBEDDED_TARGET
from unmask.objectives.confidence import ConfidenceHead
from unmask.pairing.server import DraftServer
from unmask.pairing.vocabulary import load_vocabulary
from unmask.pairing.wire import Proposals, Step
from unmask.targets import resolve_target

NUM_TOKENS = 60
TEXT = "The lighthouse keeper climbs the stairs every evening and lights the lamp before the first ship comes in."
PROMPT_LENGTHS = (3, 5, 8, 11)


class WholePrompts(LookupDraft):
    """Knows a request by its first row: it may be asked for no proposal for long."""

    def _answer(self, step: Step) -> Proposals:
        for request, start, num_features, *_ in step.rows.tolist():
            if start == 0:
                (self.of_request[request],) = [t for t in self.texts if len(t) == num_features + NUM_TOKENS]
        return super()._answer(step)


def recording(own_step: Callable[[list], list], asked: list[tuple[int, int]]) -> Callable[[list], list]:
    """Steps of an engine, and for each the K that was asked for and the longest block of the answer."""

    def step(batch: list) -> list:
        replies = own_step(batch)
        for (_, step), reply in zip(batch, replies, strict=True):
            asked.append((step.num_speculative_tokens, int(reply.counts.max(initial=0))))
        return replies

    return step


@pytest.mark.slow
def test_blocks_end_where_the_head_doubts_them(target: Path, tmp_path: Path, prompts, plain_texts) -> None:
    """Rows that cost the target time and are hardly ever accepted are not proposed; the text is the same."""
    from vllm import SamplingParams

    draft = load_draft(make_draft(target, tmp_path / "draft"))
    head = ConfidenceHead(draft.config.hidden_size, draft.config.block_size - 1).requires_grad_(False)
    head.bias[:2], head.bias[2:] = 5, -9
    asked: list[tuple[int, int]] = []
    bounds: list[float] = []
    with remote_engine(target, tmp_path) as remote:
        remote.link_options["adaptive_k"] = True
        server = DraftServer(draft, *load_vocabulary(target, torch.float32), SECRET, confidence=head)
        own_step = recording(server._engine.step, asked)
        server._engine.step = lambda batch: (bounds.extend(step.min_chance for _, step in batch), own_step(batch))[1]
        remote.use(server)
        assert greedy(remote.llm, prompts, NUM_TOKENS) == plain_texts
        assert remote.link.status["failures"] == 0
        assert max(bounds) > 0
        # Of requests that are sampled the head knows nothing.
        bounds.clear()
        sampling = SamplingParams(temperature=0.7, seed=1, max_tokens=8, ignore_eos=True, detokenize=False)
        remote.llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    assert set(bounds) == {0.0}
    # What a row costs is known from the second step on, and a K is kept for sixteen.
    assert (K, 2) in asked
    assert asked.index((K, 2)) < 8


@pytest.mark.slow
def test_a_draft_that_is_never_right_is_soon_asked_for_less(target: Path, tmp_path: Path, prompts) -> None:
    draft = load_draft(make_draft(target, tmp_path / "draft"))
    with remote_engine(target, tmp_path) as remote:
        plain = greedy(remote.llm, prompts, 30)
        remote.link_options["adaptive_k"] = True
        server = DraftServer(draft, *load_vocabulary(target, torch.float32), SECRET)
        remote.use(server)
        assert greedy(remote.llm, prompts, 30) == plain
        assert remote.link.status["failures"] == 0
        stats = server.stats()
    assert 0 < stats.proposed_tokens < K * stats.proposals


@pytest.mark.slow
def test_a_lower_k_changes_no_token(target: Path, tmp_path: Path, prompts, plain_texts) -> None:
    """A draft that is never right is soon asked for less, one that is mostly right for more again."""
    vocabulary = load_vocabulary(target, torch.float32)
    draft = load_draft(make_draft(target, tmp_path / "draft"))
    asked: list[tuple[int, int]] = []
    with remote_engine(target, tmp_path) as remote:
        remote.link_options["adaptive_k"] = True
        server = DraftServer(draft, *vocabulary, SECRET)
        own_step = server._engine.step
        server._engine.step = recording(lambda batch: own_step(batch), asked)
        remote.use(server)
        assert greedy(remote.llm, prompts, NUM_TOKENS) == plain_texts
        assert remote.link.status["failures"] == 0
        wrong = asked[-1]
        lookup = WholePrompts([p + t for p, t in zip(prompts, plain_texts, strict=True)], NUM_TOKENS)
        lookup.is_right = True
        own_step = lookup.step
        for _ in range(5):
            assert greedy(remote.llm, prompts, NUM_TOKENS) == plain_texts
        assert remote.link.status["failures"] == 0
    assert asked[4] == (K, K)
    assert all(drafted in (0, k) for k, drafted in asked)
    assert wrong[1] < K
    assert max(drafted for _, drafted in asked[-8:]) > wrong[1]


@pytest.fixture(scope="module")
def target() -> Path:
    return resolve_target(EMBEDDED_TARGET)


@pytest.fixture(scope="module")
def prompts(target: Path) -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(target)(TEXT)["input_ids"]
    return [ids[:length] for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def plain_texts(target: Path, prompts: list[list[int]]) -> list[list[int]]:
    with engine(target) as llm:
        return greedy(llm, prompts, NUM_TOKENS)
