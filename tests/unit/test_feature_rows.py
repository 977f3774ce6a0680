from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engines.feature_rows import feature_rows
from unmask.types import ProposalRow


def test_rejected_drafts_are_dropped_and_the_bonus_is_the_anchor() -> None:
    """A prompt chunk, a whole prompt, a decode without drafts, and three drafts of which one was accepted."""
    rows, kept = feature_rows(
        [7, 8, 9, 4], np.array([16, 0, 30, 50]), np.array([0, 4, 7, 8, 12]), [0, 0, 0, 3], [[], [5], [6], [1, 2]]
    )
    assert rows == [
        ProposalRow(request=7, start=16, num_features=4, last_token=-1),
        ProposalRow(request=8, start=0, num_features=3, last_token=5),
        ProposalRow(request=9, start=30, num_features=1, last_token=6),
        ProposalRow(request=4, start=50, num_features=2, last_token=2),
    ]
    assert kept is not None
    assert kept.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_nothing_is_gathered_where_nothing_was_rejected() -> None:
    rows, kept = feature_rows([1, 2], np.array([3, 9]), np.array([0, 3, 4]), [2, 0], [[1, 2, 3], [4]])
    assert [row.num_features for row in rows] == [3, 1]
    assert kept is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 5)), min_size=1, max_size=8))
def test_kept_rows_equal_a_loop(requests: list[tuple[int, int, int]]) -> None:
    """(drafted, accepted, rows of a prompt) per request; the positions of kept rows go on where they should."""
    drafted = [d for d, _, _ in requests]
    lengths = [d + 1 if d else n for d, _, n in requests]
    gained = [min(a, d) + 1 for d, a, _ in requests]
    starts = np.arange(len(requests)) * 100
    ends = np.concatenate([[0], np.cumsum(lengths)])
    expected = [ends[i] + j for i in range(len(requests)) for j in range(gained[i] if drafted[i] else lengths[i])]
    rows, kept = feature_rows(range(len(requests)), starts, ends, drafted, [list(range(g)) for g in gained])
    assert (kept.tolist() if kept is not None else list(range(ends[-1]))) == expected
    assert sum(row.num_features for row in rows) == len(expected)
    assert [row.last_token for row in rows] == [g - 1 for g in gained]
