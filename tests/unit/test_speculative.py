"""The plain speculative loop: it never changes what the target says, greedy or sampled."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.draft_tools import VOCAB, tiny_pair
from unmask.decoding.speculative import longest_match, sample, speculative_decode
from unmask.types import SamplingOptions

EOS = frozenset({2})


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


def decode(target, draft, prompt, k=3, seed=0, eos_ids=EOS, **options):
    return speculative_decode(
        target,
        draft,
        prompt,
        SamplingOptions(**options),
        num_speculative_tokens=k,
        eos_ids=eos_ids,
        generator=torch.Generator().manual_seed(seed),
    )


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=9), k=st.integers(1, 3))
def test_greedy_text_is_the_targets_own(pair, prompt, k):
    target, draft = pair
    paired = decode(target, draft, prompt, k=k, max_tokens=12).token_ids
    assert paired == decode(target, None, prompt, max_tokens=12).token_ids
    with torch.no_grad():
        following = target.model(torch.tensor([prompt + paired])).logits[0].argmax(-1).tolist()
    assert paired == following[len(prompt) - 1 : -1]


@pytest.mark.slow
def test_a_thousand_prompts_keep_the_targets_greedy_text(trained_pair):
    generator = torch.Generator().manual_seed(0)
    accepted = 0
    for _ in range(1000):
        length = int(torch.randint(1, 10, (1,), generator=generator))
        prompt = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        paired = trained_pair.decode(prompt, trained_pair.draft)
        assert paired.token_ids == trained_pair.decode(prompt, None).token_ids, prompt
        accepted += sum(paired.accepted)
    # About 490, by how far this machine's rounding lets the toy learn: enough blocks are accepted in part.
    assert accepted > 250, "the draft has to be right now and then"


def test_an_oracle_draft_is_accepted_whole():
    target, draft = tiny_pair(block_size=4)
    prompt = [5, 9, 4]
    own = decode(target, None, prompt, max_tokens=17, ignore_eos=True).token_ids

    class Oracle:
        """Knows the target's text: what a perfect draft would propose."""

        config = draft.config

        def project_features(self, features):
            return draft.project_features(features)

        def context_kv(self, context, positions):
            return draft.context_kv(context, positions)

        def denoise(self, x, positions, *_):
            start = int(positions[0, 0]) - len(prompt) + 1
            tokens = own[start : start + x.shape[1] - 1]
            tokens = tokens + [0] * (x.shape[1] - 1 - len(tokens))
            wanted = torch.linalg.pinv(target.lm_head.T)
            rows = torch.nn.functional.one_hot(torch.tensor(tokens), VOCAB).float() @ wanted
            return torch.cat([x[0, :1], rows])[None]

    result = decode(target, Oracle(), prompt, max_tokens=17, ignore_eos=True)
    assert result.token_ids == own
    # One token from the prefill, then full blocks of 3 drafts and a bonus.
    assert result.accepted == [3, 3, 3, 3]
    assert result.acceptance_length == 4.0


def test_stops_at_eos_and_at_the_limit(pair):
    target, draft = pair
    free = decode(target, draft, [5, 9], max_tokens=12, ignore_eos=True).token_ids
    assert len(free) == 12
    for eos in (free[0], free[4], free[11], next(iter(set(range(VOCAB)) - set(free)))):
        stopped = decode(target, draft, [5, 9], max_tokens=12, eos_ids=frozenset({eos})).token_ids
        assert stopped == (free[: free.index(eos) + 1] if eos in free else free)


def test_sampled_text_is_distributed_as_the_targets(pair):
    """Chi-square of the token after the first, at T = 1, against the target's exact distribution.

    The rule under test is the one of the loop: a proposal is kept if the target's own sample equals it.
    """
    target, _ = pair
    draws = 100_000
    with torch.no_grad():
        logits = target.model(torch.tensor([[7, 3]])).logits[0, -1:]
    generator = torch.Generator().manual_seed(11)
    samples = sample(logits.expand(draws, -1), SamplingOptions(temperature=1.0), generator).tolist()
    best = int(logits.argmax())
    counts = torch.zeros(VOCAB)
    for draw, own in enumerate(samples):
        proposal = best if draw % 2 else draw % VOCAB
        counts[proposal if longest_match([proposal], [own]) else own] += 1
    expected = logits[0].softmax(-1) * draws
    keep = expected > 5
    # What is too rare for the test is one class of its own.
    observed = torch.cat([counts[keep], counts[~keep].sum()[None]]).double()
    wanted = torch.cat([expected[keep], expected[~keep].sum()[None]]).double()
    if wanted[-1] <= 5:
        observed, wanted = observed[:-1], wanted[:-1] * observed[:-1].sum() / wanted[:-1].sum()
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    degrees = torch.tensor(len(wanted) - 1.0, dtype=torch.float64)
    assert torch.special.gammaincc(degrees / 2, chi_square / 2) > 0.01


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_loop_samples_what_the_target_would_with_the_same_draws(pair, temperature):
    """With drafts that are never right, a round keeps only the bonus: one draw a token, as without a draft."""
    target, draft = pair
    for seed in range(2):
        result = decode(target, draft, [9, 4], k=1, seed=seed, max_tokens=12, temperature=temperature, ignore_eos=True)
        assert len(result.token_ids) == 12
        assert sum(result.accepted) + len(result.accepted) + 1 >= 12


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(500, -1)
    generator = torch.Generator().manual_seed(0)
    assert set(sample(logits, SamplingOptions(temperature=1.0, top_k=2), generator).tolist()) == {0, 1}
    probabilities = logits[0].softmax(-1)
    p = float(probabilities[0] + probabilities[1] / 2)
    assert set(sample(logits, SamplingOptions(temperature=1.0, top_p=p), generator).tolist()) == {0, 1}
    assert set(sample(logits, SamplingOptions(temperature=0.0), None).tolist()) == {0}


@pytest.mark.parametrize(
    ("proposal", "samples", "length"),
    [([1, 2, 3], [1, 2, 3, 4], 3), ([1, 9, 3], [1, 2, 3, 4], 1), ([9], [1, 2], 0), ([], [1], 0)],
)
def test_longest_match_is_a_prefix(proposal, samples, length):
    assert longest_match(proposal, samples) == length
