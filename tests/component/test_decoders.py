from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import diffusion_references as reference
from tests.diffusion_tools import EOS, MASK, VOCAB, request, tiny
from unmask.decoding.decoder import Decoder
from unmask.decoding.generate import generate
from unmask.decoding.logits import Logits
from unmask.decoding.noise import gumbel_noise
from unmask.decoding.registry import build_decoder
from unmask.decoding.request import DecodeRequest
from unmask.decoding.selection import Sampling, choose, nucleus, tempered
from unmask.errors import ConfigError, PromptError
from unmask.masking.attention import Full
from unmask.models.transformer import DiffusionLM
from unmask.types import SamplingOptions

NETWORKS = {family: tiny(family) for family in ("llada", "dream")}
RULES: dict[str, tuple[dict[str, Any], reference.Rule]] = {
    "one_token": ({"name": "one_token"}, reference.top_n(1)),
    "three_tokens": ({"name": "one_token", "tokens_per_forward": 3}, reference.top_n(3)),
    "threshold": ({"name": "threshold", "threshold": 0.4}, reference.above(0.4)),
    "factor": ({"name": "threshold", "factor": 1.2}, reference.by_factor(1.2)),
    "dparallel": ({"name": "dparallel", "threshold": 1.5}, reference.below_entropy(1.5)),
}


def check(decoder: Decoder, asked: DecodeRequest, expected: reference.Decoded) -> None:
    (completion,) = generate(decoder, [asked])
    assert completion.response_ids == expected.response
    assert completion.num_forwards == expected.num_forwards
    assert completion.finish_reason == ("stop" if EOS in expected.response else "length")


@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(prompt_len=st.integers(1, 7), max_tokens=st.integers(3, 14), seed=st.integers(0, 50))
def test_decoders_follow_their_algorithm(
    family: str, cache: str, rule: str, prompt_len: int, max_tokens: int, seed: int
) -> None:
    knobs, commit = RULES[rule]
    asked = request(prompt_len, max_tokens, seed=seed)
    decoder = build_decoder({**knobs, "block_size": 5, "cache": cache}, NETWORKS[family])
    expected = reference.semi_autoregressive(
        NETWORKS[family], list(asked.prompt_ids), max_tokens, 5, commit, cache=cache
    )
    check(decoder, asked, expected)


class Scripted:
    """A denoiser that is sure of one given token a column, and more or less sure of the columns."""

    vocab_size, mask_id, eos_ids, max_length = VOCAB, MASK, (EOS,), 256
    attention, block_size, device = "bidirectional", None, torch.device("cpu")

    def __init__(self, answer: list[int], sharpness: list[float]) -> None:
        self.logits = torch.zeros(len(answer), VOCAB)
        for column, (token, value) in enumerate(zip(answer, sharpness, strict=True)):
            self.logits[column, token] = value
        self.num_calls = 0

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, **call: Any) -> torch.Tensor:
        self.num_calls += 1
        return self.logits[call["logits_at"]]


def scripted(answer: list[int], sharpness: list[float] | None = None) -> tuple[Scripted, DecodeRequest]:
    """A denoiser that answers `answer` to a prompt of two tokens, and the request."""
    sure = sharpness or [20.0] * len(answer)
    network = Scripted([0, 0, *answer], [0.0, 0.0, *sure])
    options = SamplingOptions(max_tokens=len(answer))
    return network, DecodeRequest(request_id="r", prompt_ids=(1, 2), options=options)


def test_stop_comes_after_the_block_that_holds_eos_and_not_before_it_is_complete() -> None:
    answer = [3, 4, EOS, 5, 6, 7, 8, 9]
    network, asked = scripted(answer, [1.0, 20.0, 20.0, 1.0, 20.0, 20.0, 20.0, 20.0])
    (completion,) = generate(build_decoder({"name": "threshold", "block_size": 4}, network), [asked])
    assert completion.response_ids == [3, 4, EOS]
    assert completion.num_forwards == completion.forwards_at_eos == network.num_calls == 3
    assert completion.commit_step == [2, 1, 1]
    assert completion.num_text_tokens == 2
    assert completion.tokens_per_forward == pytest.approx(2 / 3)


def test_nfe_with_and_without_padding_after_eos() -> None:
    network, asked = scripted([3, EOS, EOS, EOS, EOS, EOS, EOS, EOS])
    go_on = DecodeRequest(
        request_id="r", prompt_ids=asked.prompt_ids, options=SamplingOptions(max_tokens=8, ignore_eos=True)
    )
    decoder = build_decoder({"name": "dparallel", "block_size": 2}, network)
    (stopped,), (whole,) = generate(decoder, [asked]), generate(decoder, [go_on])
    assert (stopped.num_forwards, stopped.response_ids, stopped.finish_reason) == (1, [3, EOS], "stop")
    assert (whole.num_forwards, whole.forwards_at_eos, whole.finish_reason) == (4, 1, "length")
    assert whole.response_ids[: len(stopped.response_ids)] == stopped.response_ids


def test_eos_in_the_prompt_stops_nothing() -> None:
    network, _ = scripted([3, 4, 5, 6])
    asked = DecodeRequest(request_id="r", prompt_ids=(EOS, EOS), options=SamplingOptions(max_tokens=4))
    (completion,) = generate(build_decoder({"name": "one_token", "block_size": 2}, network), [asked])
    assert completion.response_ids == [3, 4, 5, 6]


def test_request_stop_ids_end_a_response_too() -> None:
    network, _ = scripted([3, 4, 5, 6, 7, 8])
    asked = DecodeRequest(request_id="r", prompt_ids=(1, 2), options=SamplingOptions(max_tokens=6, stop_token_ids=(4,)))
    (completion,) = generate(build_decoder({"name": "one_token", "block_size": 3}, network), [asked])
    assert (completion.response_ids, completion.finish_reason) == ([3, 4], "stop")


def test_the_mask_token_is_never_committed() -> None:
    network, asked = scripted([MASK] * 6)
    for name in ("one_token", "threshold", "dparallel"):
        (completion,) = generate(build_decoder({"name": name, "block_size": 3}, network), [asked])
        assert MASK not in completion.response_ids
        assert len(completion.response_ids) == 6


@pytest.mark.parametrize("max_tokens", [1, 4, 7, 8, 9])
def test_a_response_need_not_be_whole_blocks(max_tokens: int) -> None:
    network, asked = scripted([5] * max_tokens)
    (completion,) = generate(build_decoder({"name": "threshold", "block_size": 4}, network), [asked])
    assert completion.response_ids == [5] * max_tokens
    assert completion.num_forwards == -(-max_tokens // 4)


def test_a_block_committed_by_its_first_forward_costs_one_forward_with_any_cache() -> None:
    for cache in ("prefix", "dual"):
        decoder = build_decoder({"name": "threshold", "threshold": 0.01, "cache": cache}, NETWORKS["dream"])
        (completion,) = generate(decoder, [request(4, 32, seed=3, ignore_eos=True)])
        assert completion.num_forwards == 1


@pytest.mark.parametrize(
    ("prompt_ids", "options", "error", "words"),
    [
        ((), {}, PromptError, "empty"),
        ((1, MASK, 2), {}, PromptError, "mask token"),
        ((1, VOCAB), {}, PromptError, "must lie in"),
        ((-1,), {}, PromptError, "must lie in"),
        ((1,), {"max_tokens": 0}, ConfigError, "at least 1"),
        ((1,), {"max_tokens": 256}, ConfigError, "exceed the model's 256"),
        ((1,), {"top_k": 5}, ConfigError, "top_k: is not supported"),
        ((1,), {"logprobs": 2}, ConfigError, "logprobs: is not supported"),
    ],
)
def test_requests_that_cannot_be_decoded_are_refused(
    prompt_ids: tuple[int, ...], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    asked = DecodeRequest(request_id="r", prompt_ids=prompt_ids, options=SamplingOptions(**options))
    with pytest.raises(error, match=words):
        generate(build_decoder({"name": "one_token"}, NETWORKS["llada"]), [asked])


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({}, "unknown decoder None"),
        ({"name": "dparalel"}, "did you mean 'dparallel'"),
        ({"name": "dparallel", "treshold": 0.4}, "did you mean 'threshold'"),
        ({"name": "dparallel", "threshold": -1}, "0 nats or more"),
        ({"name": "dparallel", "threshold": "high"}, "threshold"),
        ({"name": "threshold", "cache": "triple"}, "cache"),
        ({"name": "one_token", "tokens_per_forward": 33}, "between 1 and block_size"),
        ({"name": "one_token", "block_size": 0}, "at least 1"),
        ({"name": "d2f"}, "needs a block_causal network, this one is bidirectional"),
        ({"name": "apd"}, "needs a verifier"),
    ],
)
def test_impossible_decoders_are_refused(settings_: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_decoder(settings_, NETWORKS["llada"])


def test_a_block_causal_network_is_refused_by_decoders_that_look_ahead() -> None:
    network = tiny("llada", attention="block_causal", block_size=4)
    for name in ("one_token", "threshold", "dparallel"):
        with pytest.raises(ConfigError, match="needs a bidirectional network"):
            build_decoder({"name": name}, network)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Standardised chi-square statistic of the cells that expect at least 5: about N(0, 1) under the null."""
    expected = probabilities * counts.sum()
    cells = expected >= 5
    degrees = cells.sum() - 1
    statistic = ((counts[cells] - expected[cells]) ** 2 / expected[cells]).sum()
    return float((statistic - degrees) / np.sqrt(2 * degrees))


@pytest.mark.parametrize("vary", ["seed", "column"])
def test_noise_samples_softmax_over_seeds_and_over_columns(vary: str) -> None:
    count = 20_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0))
    many, one = torch.arange(count), torch.zeros(1, dtype=torch.long)
    noise = (
        gumbel_noise(many, one.expand(count, 1), 12)[:, 0] if vary == "seed" else gumbel_noise(one, many[None], 12)[0]
    )
    assert noise.isfinite().all()
    counts = np.bincount((logits + noise).argmax(-1).numpy(), minlength=12)
    assert chi_square(counts, logits.softmax(-1).numpy()) < 4
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(torch.corrcoef(torch.stack((noise[:-1, 0], noise[1:, 0])))[0, 1].item()) < 0.03


def test_noise_is_a_function_of_seed_column_and_token_alone() -> None:
    columns = torch.tensor([[5, 6, 7], [6, 9, 5]])
    both = gumbel_noise(torch.tensor([3, -8]), columns, 11)
    alone = gumbel_noise(torch.tensor([-8]), columns[1:, 1:2], 11)
    assert torch.equal(both[1, 1], alone[0, 0])
    assert torch.equal(both[0, 1], gumbel_noise(torch.tensor([3]), torch.tensor([[6]]), 20)[0, 0, :11])
    assert not torch.equal(both[0, 1], both[1, 0])


def test_nucleus_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]]
    for top_p, kept in ((0.4, [1]), (0.7, [1, 3]), (0.8, [1, 3]), (0.81, [0, 1, 3]), (1.0, [0, 1, 2, 3])):
        sampling = Sampling(torch.ones(1), torch.tensor([top_p]), torch.zeros(1, dtype=torch.long), nucleus=True)
        log_probs = nucleus(tempered(logits[None, None], sampling), sampling)[0, 0]
        assert log_probs.isfinite().nonzero().flatten().tolist() == kept
        assert log_probs.exp().sum().item() == pytest.approx(1)


def test_a_greedy_row_is_greedy_beside_a_sampled_one() -> None:
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(1))
    columns = torch.arange(3).expand(2, -1)
    sampling = Sampling(torch.tensor([0.0, 5.0]), torch.tensor([0.1, 0.9]), torch.tensor([1, 2]), nucleus=True)
    tokens = choose(Logits(logits, None), columns, sampling)
    assert torch.equal(tokens[0], logits[0].argmax(-1))
    assert not torch.equal(tokens[1], logits[1].argmax(-1))


def test_entropy_survives_a_forbidden_token() -> None:
    logits = Logits(torch.tensor([[[0.0, 0.0, 7.0]]]), 2)
    assert logits.entropy_BK.item() == pytest.approx(np.log(2))
    assert logits.probability(logits.best_BK).item() == pytest.approx(0.5)
    assert logits.margin_BK.item() == pytest.approx(0, abs=1e-6)
    assert (logits.best_BK, logits.values_BKV[0, 0, 2]) == (0, -torch.inf)


def test_a_sampled_response_repeats_with_its_seed() -> None:
    decoder = build_decoder({"name": "threshold", "block_size": 4}, NETWORKS["dream"])
    first, again, other = (generate(decoder, [request(3, 12, seed=seed, temperature=1.0)])[0] for seed in (1, 1, 2))
    assert first == again
    assert first.response_ids != other.response_ids


def test_decoding_feeds_full_rows_under_full_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    network: DiffusionLM = tiny("llada")
    masks = []
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda *args, **call: masks.append(call["mask"]) or forward(*args, **call))
    generate(build_decoder({"name": "one_token", "block_size": 4}, network), [request(3, 4)])
    assert len(masks) == 4
    assert all(isinstance(mask, Full) for mask in masks)
