"""The n-gram baseline."""

from hypothesis import given
from hypothesis import strategies as st

from unmask.decoding.ngram import NgramProposer, replay

TOKENS = st.lists(st.integers(0, 5), min_size=1, max_size=30)


def test_prompt_lookup_comes_first():
    proposer = NgramProposer([[7, 8, 9]])
    assert proposer.propose([1, 2, 3, 4, 1, 2], 2) == [3, 4]
    assert proposer.propose([1, 2, 3, 1, 2], 5) == [3, 1, 2, 3, 1]
    assert proposer.propose([5, 7], 3) == [8, 9]
    assert proposer.propose([5], 3) == []


def test_the_most_frequent_continuation_of_the_longest_suffix_wins():
    proposer = NgramProposer([[1, 2, 3], [1, 2, 3], [0, 2, 4]])
    assert proposer.propose([1, 2], 1) == [3]
    assert proposer.propose([0, 2], 1) == [4]
    assert proposer.propose([9, 2], 1) == [3]


@given(responses=st.lists(TOKENS, max_size=5), prompt=TOKENS, response=TOKENS, num_tokens=st.integers(1, 5))
def test_replay_is_a_verified_loop(responses, prompt, response, num_tokens):
    proposer = NgramProposer(responses)
    continued = response + [0] * num_tokens
    accepted = replay(proposer, prompt, continued, num_tokens, until=len(response))
    done = 1
    for count in accepted:
        proposal = proposer.propose([*prompt, *continued[:done]], num_tokens)
        assert proposal[:count] == continued[done : done + count]
        if count < len(proposal) and done + count < len(continued):
            assert proposal[count] != continued[done + count]
        done += count + 1
    assert done >= len(response)


def test_a_repeating_response_is_accepted_whole():
    response = [1, 2, 3] * 8
    accepted = replay(NgramProposer([]), [9], [*response, 1, 2, 3, 1], 4, until=len(response))
    assert accepted[-1] == 4
