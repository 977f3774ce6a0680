from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import diffusion_references as reference
from tests.diffusion_tools import EOS, MASK, VOCAB, everything, predictions, request, tiny
from unmask.decoding.apd import APD
from unmask.decoding.generate import generate
from unmask.decoding.noise import gumbel_noise
from unmask.decoding.registry import build_decoder
from unmask.decoding.request import DecodeRequest
from unmask.errors import ConfigError
from unmask.models import adapted
from unmask.models.transformer import DiffusionLM
from unmask.types import SamplingOptions

DRAFTERS = {family: tiny(family) for family in ("llada", "dream")}
VERIFIER = tiny("causal", seed=1)


def apd(drafter: DiffusionLM, verifier: DiffusionLM = VERIFIER, **knobs: Any) -> APD:
    return build_decoder({"name": "apd", **knobs}, drafter, verifier=verifier)


@pytest.mark.parametrize("family", DRAFTERS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    prompt_len=st.integers(1, 6),
    max_tokens=st.integers(1, 18),
    seed=st.integers(0, 99),
    weight=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    window=st.sampled_from([None, 1, 3, 50]),
    lookahead=st.sampled_from([1, 3, 7, 50]),
    temperature=st.sampled_from([0.0, 0.5, 1.3]),
    compat=st.sampled_from(["paper", "released"]),
)
def test_decoding_follows_algorithm_1(
    family: str,
    prompt_len: int,
    max_tokens: int,
    seed: int,
    weight: float,
    window: int | None,
    lookahead: int,
    temperature: float,
    compat: str,
) -> None:
    asked = request(prompt_len, max_tokens, seed=seed, temperature=temperature)
    decoder = apd(DRAFTERS[family], mixture_weight=weight, kv_window=window, max_lookahead=lookahead, compat=compat)
    (completion,) = generate(decoder, [asked])
    expected = reference.apd(
        DRAFTERS[family],
        VERIFIER,
        list(asked.prompt_ids),
        max_tokens,
        weight=weight,
        window=window,
        lookahead=lookahead,
        temperature=temperature,
        seed=seed,
        compat=compat,
    )
    assert completion.response_ids == expected.response
    assert completion.num_forwards == expected.num_forwards
    assert completion.num_forwards <= max_tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_pure_diffusion_mixture_accepts_everything(temperature: float) -> None:
    asked = request(4, 16, seed=3, temperature=temperature, ignore_eos=True)
    (completion,) = generate(apd(DRAFTERS["dream"], mixture_weight=1.0), [asked])
    assert completion.num_forwards == 1
    assert len(completion.response_ids) == 16


class Scripted:
    """Predicts its script, whatever it is shown."""

    vocab_size, mask_id, eos_ids, max_length, block_size = VOCAB, MASK, (EOS,), 256, None
    device = torch.device("cpu")

    def __init__(self, attention: str, script: list[int]) -> None:
        self.attention = attention
        self.script = torch.nn.functional.one_hot(torch.tensor([0, 0, *script]), VOCAB) * 9.0

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, **call: Any) -> torch.Tensor:
        return self.script[call["logits_at"]]


def scripted(draft: list[int], check: list[int], **knobs: Any) -> Any:
    pair = Scripted("bidirectional", draft), Scripted("causal", check)
    decoder = build_decoder({"name": "apd", "kv_window": None, **knobs}, pair[0], verifier=pair[1])
    options = SamplingOptions(max_tokens=len(draft))
    return generate(decoder, [DecodeRequest(request_id="r", prompt_ids=(1, 2), options=options)])[0]


def test_a_verifier_that_agrees_accepts_everything() -> None:
    assert scripted([3, 4, 5, 6], [3, 4, 5, 6], mixture_weight=0.0).num_forwards == 1


def test_the_first_token_is_accepted_unseen_and_the_rest_up_to_the_first_disagreement() -> None:
    completion = scripted([3, 4, 5, 6, 7, 8], [9, 4, 5, 1, 7, 8], mixture_weight=0.0)
    assert completion.response_ids == [3, 4, 5, 6, 7, 8]
    assert completion.commit_step == [1, 1, 1, 2, 2, 2]


def test_text_after_an_accepted_eos_is_cut() -> None:
    completion = scripted([3, EOS, 5, 6], [3, EOS, 5, 6])
    assert (completion.response_ids, completion.finish_reason) == ([3, EOS], "stop")
    assert (completion.num_forwards, completion.num_text_tokens) == (1, 1)


def test_the_mask_token_is_neither_drafted_nor_verified() -> None:
    completion = scripted([MASK, MASK, MASK], [MASK, MASK, MASK])
    assert MASK not in completion.response_ids


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    return 0.5 * (p - q).abs().sum().item()


@pytest.mark.parametrize("seed", range(4))
def test_shared_noise_couples_at_least_as_well_as_its_bound(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (2 * torch.randn(10, generator=generator) for _ in range(2))
    noise = gumbel_noise(torch.arange(20_000), torch.zeros(20_000, 1, dtype=torch.long), 10)[:, 0]
    mismatch = ((p + noise).argmax(-1) != (q + noise).argmax(-1)).float().mean().item()
    variation = total_variation(p.softmax(-1), q.softmax(-1))
    assert mismatch <= 2 * variation / (1 + variation) + 0.01
    assert mismatch >= variation - 0.01


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_drafts_are_distributed_as_the_diffusion_marginals(temperature: float) -> None:
    count = 3000
    drafter = tiny("dream", std=0.15)
    prompt = request(3, 1, seed=0)
    requests = [
        DecodeRequest(
            request_id=str(seed),
            prompt_ids=prompt.prompt_ids,
            options=SamplingOptions(max_tokens=2, temperature=temperature, seed=seed, ignore_eos=True),
        )
        for seed in range(count)
    ]
    drafts = [completion.response_ids for completion in generate(apd(drafter, mixture_weight=1.0), requests)]
    z = predictions(drafter, [*prompt.prompt_ids, MASK, MASK], everything)
    for column in (3, 4):
        expected = (z[column] / temperature).softmax(-1).numpy() * count
        counts = np.bincount([draft[column - 3] for draft in drafts], minlength=VOCAB)
        cells = expected >= 5
        statistic = ((counts[cells] - expected[cells]) ** 2 / expected[cells]).sum()
        degrees = cells.sum() - 1
        assert (statistic - degrees) / np.sqrt(2 * degrees) < 4


def test_without_temperature_the_released_acceptance_is_the_same() -> None:
    for seed in range(8):
        asked = request(4, 20, seed=seed)
        paper, released = (
            generate(apd(DRAFTERS["dream"], mixture_weight=0.5, compat=compat), [asked])[0]
            for compat in ("paper", "released")
        )
        assert paper == released


def test_a_smaller_verifier_vocabulary_limits_the_draft() -> None:
    config = {**VERIFIER.config.source, "vocab_size": 30}
    verifier = adapted.build(config, seed=1, std=0.3)
    asked = DecodeRequest(request_id="r", prompt_ids=(1, 2, 3), options=SamplingOptions(max_tokens=20, temperature=2.0))
    (completion,) = generate(apd(DRAFTERS["llada"], verifier), [asked])
    assert max(completion.response_ids) < 30
    too_large = DecodeRequest(request_id="r", prompt_ids=(1, 35), options=SamplingOptions(max_tokens=4))
    with pytest.raises(ConfigError, match="verifier"):
        generate(apd(DRAFTERS["llada"], verifier), [too_large])


def test_networks_in_each_others_place_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs a bidirectional network, this one is causal"):
        apd(VERIFIER)
    with pytest.raises(ConfigError, match="verifier needs a causal network"):
        apd(DRAFTERS["dream"], DRAFTERS["dream"])


@pytest.mark.parametrize("knobs", [{"mixture_weight": 1.2}, {"kv_window": 0}, {"max_lookahead": 0}, {"compat": "both"}])
def test_impossible_settings_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        apd(DRAFTERS["dream"], **knobs)
