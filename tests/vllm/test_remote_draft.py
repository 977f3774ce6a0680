"""The remote draft against vLLM's own `dflash` method, transformers, and a target without a draft. In float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.vllm.remote_tools import SECRET, Blocks, LookupDraft, Remote, recorded_blocks, remote_engine
from tests.vllm.vllm_tools import LAYER_IDS, MAX_MODEL_LEN, K, engine, greedy, make_draft
from unmask.checkpoints import load_draft, save_draft
from unmask.config import EMBEDDED_TARGET
from unmask.pairing.projection import Projection
from unmask.pairing.server import DraftServer
from unmask.pairing.vocabulary import load_vocabulary
from unmask.targets import resolve_target

NUM_TOKENS = 24
TEXT = (
    "The history of the lighthouse begins with fires on hilltops. As ports grew, towers were raised so that the "
    "light could be seen from farther away, and keepers were paid to tend it through the night. "
) * 8
PROMPT_LENGTHS = (MAX_MODEL_LEN - NUM_TOKENS - 1, 3, 17, 40, 75, 90)
"""All different: they tell requests apart. The long ones are cut into chunks, the first ends at the length limit."""


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


def test_preempted_requests_start_over(target: Path, new_server, prompts, plain_texts, tmp_path: Path) -> None:
    lookup = LookupDraft([p + t for p, t in zip(prompts[1:], plain_texts[1:], strict=True)], NUM_TOKENS)
    with remote_engine(target, tmp_path, max_model_len=128, block_size=32, num_gpu_blocks_override=8) as small:
        server = new_server()
        server._engine.step = lookup.step
        small.use(server)
        assert greedy(small.llm, prompts[1:], NUM_TOKENS) == plain_texts[1:]
        assert small.link.status["failures"] == 0
    assert lookup.num_restarts > 0


@pytest.fixture(scope="module")
def speculators_dir(target: Path, draft_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same draft in speculators' layout."""
    path = tmp_path_factory.mktemp("s") / "draft"
    save_draft(load_draft(draft_dir), path, None, dtype=torch.float32, form="speculators", verifier=str(target))
    return path


def test_vllm_reads_no_causal_layer_from_the_speculators_form(speculators_dir: Path) -> None:
    from vllm.model_executor.models.qwen3_dflash import _dflash_layer_causal
    from vllm.transformers_utils.configs.speculators import SpeculatorsConfig

    config = SpeculatorsConfig.from_pretrained(speculators_dir)
    assert config.dflash_config["target_layer_ids"] == list(LAYER_IDS)
    assert [_dflash_layer_causal(config, layer) for layer in range(config.num_hidden_layers)] == [False, False]


@pytest.mark.slow
def test_every_block_of_the_speculators_form_equals_native_dflash(
    speculators_dir: Path, prompts, plain_texts, native_blocks: Blocks
) -> None:
    """The directory alone names target and draft, as for `vllm serve`."""
    options = {"num_speculative_tokens": K}
    with engine(speculators_dir, speculative_config=options) as llm, recorded_blocks(llm) as blocks:
        assert greedy(llm, prompts[1:], NUM_TOKENS) == plain_texts[1:]
    assert blocks == native_blocks


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
    lookup = LookupDraft(texts, NUM_TOKENS)
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
