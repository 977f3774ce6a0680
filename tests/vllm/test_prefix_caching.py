"""Prefix caching in the target with a remote draft: the draft keeps the context of cached prefixes too. In float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.vllm.remote_tools import SECRET, LookupDraft, recorded_blocks, remote_engine
from tests.vllm.vllm_tools import LAYER_IDS, K, engine, greedy, make_draft
from unmask.checkpoints import load_draft
from unmask.config import EMBEDDED_TARGET
from unmask.pairing.projection import Projection
from unmask.pairing.server import DraftServer
from unmask.pairing.vocabulary import load_vocabulary
from unmask.targets import resolve_target

NUM_TOKENS = 16
NUM_PROMPTS = 16
SHARED = 200
TEXT = (
    "A tide table lists the times of high and low water for a place. It is reckoned from the moon and the sun, and "
    "from what was measured at that place for many years. Sailors, fishers and builders of harbours rely on it. "
) * 12
LONG = 2000
LONG_TEXT = TEXT * 4
LONG_ENGINE = {"max_model_len": 2304, "max_num_batched_tokens": 512, "disable_log_stats": False}
ENGINE = {"block_size": 32, "enable_prefix_caching": True}


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
    return sharing(target, TEXT, SHARED)


def sharing(target: Path, text: str, shared: int) -> list[list[int]]:
    """Prompts that share their first ids, end differently, and are told apart by their lengths."""
    ids = AutoTokenizer.from_pretrained(target)(text)["input_ids"]
    return [ids[:shared] + ids[shared + 3 * i : shared + 4 * i + 2] for i in range(NUM_PROMPTS)]


@pytest.fixture(scope="module")
def plain_texts(target: Path, prompts: list[list[int]]) -> list[list[int]]:
    with engine(target) as llm:
        return greedy(llm, prompts, NUM_TOKENS)


def accepted_per_draft(llm: Any) -> float:
    """Mean accepted drafts of a verification since the engine started."""
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    accepted = counters["vllm:spec_decode_num_accepted_tokens"]
    return accepted / counters["vllm:spec_decode_num_drafts"]


def test_a_cached_prefix_gets_the_blocks_of_a_fresh_one(target: Path, new_server, prompts, tmp_path: Path) -> None:
    few = prompts[:3]
    blocks, texts, rows = [], [], []
    with remote_engine(target, tmp_path, **ENGINE) as remote:
        server = new_server()
        remote.use(server)
        for _ in range(2):
            with recorded_blocks(remote.llm) as recorded:
                texts.append(greedy(remote.llm, few, NUM_TOKENS))
            blocks.append(recorded)
            rows.append(remote.link.status["bytes_sent"])
        assert remote.link.status["failures"] == 0
        assert server.stats().proposals_with_gap == 0
    assert blocks[0] == blocks[1]
    assert texts[0] == texts[1]
    assert 2 * (rows[1] - rows[0]) < rows[0]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_proposals_do_not_depend_on_prefix_caching(target: Path, new_server, tmp_path: Path) -> None:
    """Sixteen requests that share a prompt of 2,000 tokens."""
    prompts = sharing(target, LONG_TEXT, LONG)
    with engine(target, **LONG_ENGINE) as llm:
        plain_texts = greedy(llm, prompts, NUM_TOKENS)
    blocks, acceptance, rows = {}, {}, {}
    for caching in (False, True):
        options = {**ENGINE, **LONG_ENGINE, "enable_prefix_caching": caching}
        with remote_engine(target, tmp_path, **options) as remote:
            server = new_server()
            remote.use(server)
            step, num_rows = server._engine.step, []

            def counting(batch: list, step: Any = step, num_rows: list = num_rows) -> list:
                num_rows.extend(len(message.features) for _, message in batch)
                return step(batch)

            server._engine.step = counting
            with recorded_blocks(remote.llm) as blocks[caching]:
                assert greedy(remote.llm, prompts[:1], NUM_TOKENS) == plain_texts[:1]
                assert greedy(remote.llm, prompts, NUM_TOKENS) == plain_texts
            acceptance[caching], rows[caching] = 1 + accepted_per_draft(remote.llm), sum(num_rows)
            assert remote.link.status["failures"] == 0
    assert rows[True] < rows[False] - (NUM_PROMPTS - 1) * (LONG - 2 * 32)
    assert blocks[True] == blocks[False]
    assert acceptance[True] == pytest.approx(acceptance[False], rel=0.02)


def test_features_are_complete_with_every_way_to_lose_them(
    target: Path, new_server, prompts, plain_texts, draft_dir, tmp_path: Path
) -> None:
    """Partial acceptance, chunked prompts, preemption and cached prefixes at once, against transformers."""
    texts = [p + t for p, t in zip(prompts, plain_texts, strict=True)]
    lookup = LookupDraft(texts, NUM_TOKENS)
    with remote_engine(target, tmp_path, **ENGINE, num_gpu_blocks_override=20) as remote:
        server = new_server()
        server._engine.step = lookup.step
        remote.use(server)
        assert greedy(remote.llm, prompts[:1], NUM_TOKENS) == plain_texts[:1]
        lookup.of_request.clear()
        assert greedy(remote.llm, prompts, NUM_TOKENS) == plain_texts
        assert remote.link.status["failures"] == 0
    assert lookup.num_restarts > 0
    assert lookup.num_shared > SHARED
    assert set(lookup.num_accepted) == set(range(K + 1))

    projection = Projection.of(load_draft(draft_dir))
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert len(lookup.of_request) == NUM_PROMPTS
    worst = 0.0
    for request, text in lookup.of_request.items():
        with torch.no_grad():
            states = model(torch.tensor([text]), output_hidden_states=True).hidden_states
        expected = projection(torch.cat([states[layer + 1][0] for layer in LAYER_IDS], dim=-1))
        held = torch.stack(lookup.rows[request])[: len(text)]
        assert len(held) >= len(text) - K - 1
        error = (held - expected[: len(held)]).norm(dim=-1) / expected[: len(held)].norm(dim=-1)
        worst = max(worst, float(error.max()))
    assert worst < 1e-4
