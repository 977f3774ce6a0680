from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import diffusion_references as reference
from tests.diffusion_tools import EOS, MASK, VOCAB, request, tiny
from unmask.decoding.d2f import D2F, Block, PipelineState, Stage
from unmask.decoding.generate import generate
from unmask.decoding.registry import build_decoder
from unmask.decoding.request import DecodeRequest
from unmask.errors import ConfigError
from unmask.models.transformer import DiffusionLM
from unmask.types import SamplingOptions

BLOCK = 4
NETWORKS = {family: tiny(family, attention="block_causal", block_size=2) for family in ("llada", "dream")}
thresholds = st.fixed_dictionaries(
    {
        "tau_add": st.sampled_from([0.0, 0.3, 0.7, 1.0]),
        "tau_act": st.sampled_from([0.3, 0.7, 1.0]),
        "tau_conf": st.sampled_from([0.2, 0.35, 0.6, 1.0]),
    }
)


def d2f(network: DiffusionLM, **knobs: Any) -> D2F:
    return build_decoder({"name": "d2f", "block_size": BLOCK, **knobs}, network)


@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize("cache", [True, False])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    prompt_len=st.integers(1, 7),
    max_tokens=st.integers(1, 22),
    seed=st.integers(0, 99),
    taus=thresholds,
    max_active=st.sampled_from([1, 2, 6]),
)
def test_the_pipeline_follows_algorithm_2(
    family: str, cache: bool, prompt_len: int, max_tokens: int, seed: int, taus: dict[str, float], max_active: int
) -> None:
    asked = request(prompt_len, max_tokens, seed=seed)
    decoder = d2f(NETWORKS[family], cache=cache, max_active_blocks=max_active, **taus)
    (completion,) = generate(decoder, [asked])
    expected = reference.d2f(NETWORKS[family], list(asked.prompt_ids), max_tokens, BLOCK, max_active=max_active, **taus)
    assert completion.response_ids == expected.response
    assert completion.num_forwards == expected.num_forwards
    assert completion.num_forwards <= max_tokens


@pytest.mark.parametrize("family", NETWORKS)
def test_with_every_threshold_at_one_it_is_one_token_a_forward_block_by_block(family: str) -> None:
    asked = request(5, 14, seed=2, ignore_eos=True)
    (completion,) = generate(d2f(NETWORKS[family], tau_add=1.0, tau_act=1.0, tau_conf=1.0), [asked])
    assert completion.num_forwards == 14
    assert sorted(completion.commit_step) == list(range(1, 15))
    blocks = [completion.commit_step[start : start + BLOCK] for start in range(0, 14, BLOCK)]
    assert all(max(before) < min(after) for before, after in itertools.pairwise(blocks))


@pytest.mark.parametrize("family", NETWORKS)
def test_cached_logits_equal_uncached_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny(family, attention="block_causal", block_size=2, seed=4)
    seen: list[torch.Tensor] = []
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda *args, **call: _keep(seen, forward(*args, **call)))
    asked = request(6, 24, seed=1, ignore_eos=True)
    knobs = {"tau_add": 0.3, "tau_act": 0.7, "tau_conf": 0.35}
    generate(d2f(network, **knobs), [asked])
    cached, seen[:] = list(seen), []
    generate(d2f(network, cache=False, **knobs), [asked])
    assert len(cached) == len(seen)
    for with_cache, without in zip(cached, seen, strict=True):
        torch.testing.assert_close(with_cache, without, atol=1e-4, rtol=1e-4)


def _keep(seen: list[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    seen.append(logits.clone())
    return logits


class Scripted:
    """A block-causal denoiser that is sure of `answer` where `sure_from[column]` forwards have passed."""

    vocab_size, mask_id, eos_ids, max_length = VOCAB, MASK, (EOS,), 256
    attention, block_size, device = "block_causal", BLOCK, torch.device("cpu")

    def __init__(self, answer: list[int], sure_from: list[int]) -> None:
        self.answer, self.sure_from = [0, 0, *answer], [0, 0, *sure_from]
        self.fed: list[int] = []

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, **call: Any) -> torch.Tensor:
        self.fed.append(ids.shape[1])
        columns = call["logits_at"][0].tolist()
        logits = torch.zeros(1, len(columns), VOCAB)
        for index, column in enumerate(columns):
            sure = column < len(self.answer) and len(self.fed) >= self.sure_from[column]
            logits[0, index, self.answer[min(column, len(self.answer) - 1)]] = 20.0 if sure else 0.5
        return logits


def run(answer: list[int], sure_from: list[int], **knobs: Any) -> tuple[Any, Scripted]:
    network = Scripted(answer, sure_from)
    options = SamplingOptions(max_tokens=len(answer))
    asked = DecodeRequest(request_id="r", prompt_ids=(1, 2), options=options)
    (completion,) = generate(d2f(network, cache=False, **knobs), [asked])
    return completion, network


def test_later_blocks_are_dropped_once_a_complete_block_holds_eos() -> None:
    answer = [3, 3, 3, 3, 4, EOS, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6]
    sure_from = [9, 9, 9, 9, 3, 3, 3, 3, 9, 9, 9, 9, 9, 9, 9, 9]
    completion, network = run(answer, sure_from, tau_add=0.0, tau_act=1.0)
    assert completion.response_ids == answer[:6]
    assert completion.finish_reason == "stop"
    assert max(network.fed) == 2 + 3 * BLOCK
    assert network.fed[-1] == 2 + 2 * BLOCK


def test_an_eos_in_a_later_block_waits_for_the_earlier_ones() -> None:
    answer = [3, 3, 3, EOS, 4, EOS, 4, 4]
    completion, _ = run(answer, [9, 9, 9, 9, 2, 2, 2, 2], tau_add=0.0, tau_act=1.0)
    assert completion.response_ids == [3, 3, 3, EOS]
    assert completion.num_forwards == completion.forwards_at_eos == 4


def test_semi_activated_blocks_never_commit_below_the_threshold() -> None:
    answer = [3, 3, 3, 3, 4, 4, 4, 4]
    completion, _ = run(answer, [1, 9, 9, 9, 2, 9, 9, 9], tau_add=0.0, tau_act=1.0)
    first, second = completion.commit_step[:BLOCK], completion.commit_step[BLOCK:]
    assert first == [1, 2, 3, 4]
    assert second == [2, 5, 6, 7]


def test_blocks_that_finish_out_of_order_are_cached_in_order() -> None:
    decoder = d2f(NETWORKS["dream"])
    state = decoder.admit(request(3, 12), slot=0)
    state.blocks = [
        Block(0, 3, num_masked=0, stage=Stage.IN_CACHE),
        Block(3, 7, num_masked=4, fully_activated=True),
        Block(7, 11, num_masked=0),
    ]
    state.cached, state.num_cached = 3, 1
    state.tokens[7:11] = 1
    window = decoder.window(state)
    assert (window.start, window.stop, window.open_start) == (3, 11, 3)
    decoder.advance(state, window, _filled(state, 3, 11))
    assert [block.stage for block in state.blocks] == [Stage.IN_CACHE, Stage.TO_CACHE, Stage.TO_CACHE, Stage.ACTIVE]
    assert (state.cached, state.committed) == (3, 11)
    window = decoder.window(state)
    assert (window.start, window.open_start) == (3, 11)
    decoder.advance(state, window, state.tokens[11:15].copy())
    assert state.cached == 11


def _filled(state: PipelineState, start: int, stop: int) -> Any:
    tokens = state.tokens[start:stop].copy()
    tokens[tokens == MASK] = 2
    return tokens


@pytest.mark.parametrize("fallback", ["probability", "margin", "entropy"])
def test_selection_variants_decode_to_the_end(fallback: str) -> None:
    asked = request(3, 13, seed=5, ignore_eos=True)
    decoders = [d2f(NETWORKS["dream"], fallback=fallback), d2f(NETWORKS["dream"], fallback=fallback, tau_entropy=3.0)]
    plain, eager = (generate(decoder, [asked])[0] for decoder in decoders)
    assert MASK not in plain.response_ids + eager.response_ids
    assert eager.num_forwards < plain.num_forwards


def test_a_sure_network_opens_a_block_a_forward_and_never_more_than_allowed() -> None:
    answer = [7] * 32
    completion, network = run(answer, [1] * 32, tau_add=0.0)
    assert completion.num_forwards == 8
    slow, network = run(answer, [99] * 32, tau_add=0.0, max_active_blocks=2)
    assert max(network.fed) <= 2 + 32
    assert slow.response_ids == answer


def test_windows_hold_at_most_the_active_blocks_and_what_is_about_to_be_cached() -> None:
    decoder = d2f(NETWORKS["llada"], tau_add=0.0, max_active_blocks=2, tau_conf=0.3)
    state = decoder.admit(request(3, 40, ignore_eos=True), slot=0)
    widths = []
    while state.finish_reason is None:
        window = decoder.window(state)
        widths.append(window.width)
        decoder.advance(state, window, _filled(state, window.open_start, window.open_stop))
    assert max(widths[1:]) <= (2 + 2) * BLOCK


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"block_size": 3}, "multiple of 2"),
        ({"tau_add": 1.5}, r"tau_add: must be in \[0, 1\]"),
        ({"tau_entropy": -0.1}, "0 nats or more"),
        ({"max_active_blocks": 63}, "between 1 and 62"),
        ({"fallback": "luck"}, "fallback"),
    ],
)
def test_impossible_settings_are_refused(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_decoder({"name": "d2f", **knobs}, NETWORKS["llada"])
