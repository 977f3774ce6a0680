"""Metrics of diffusion decoders against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from unmask.decoding.request import Completion
from unmask.evaluation.diffusion import accuracy_under_parallelism, commit_order, summarise, wilson_interval
from unmask.evaluation.diffusion_plots import plot_commit_order, plot_speed_accuracy


def completion(tokens: int, forwards: int, at_eos: int | None, steps: list[int]) -> Completion:
    return Completion(
        request_id="r",
        response_ids=list(range(tokens)),
        finish_reason="length" if at_eos is None else "stop",
        num_forwards=forwards,
        forwards_at_eos=at_eos,
        commit_step=steps,
        num_text_tokens=tokens - (at_eos is not None),
    )


def test_a_summary_pools_tokens_and_forwards() -> None:
    done = [completion(5, 4, 3, [1, 1, 2, 3, 3]), completion(2, 2, None, [2, 1])]
    summary = summarise(done, lambda index, ids: index == 0)
    assert (summary.n, summary.accuracy, summary.nfe, summary.nfe_at_eos) == (2, 50.0, 3.0, 2.5)
    assert summary.tpf == pytest.approx((4 + 2) / 6)
    assert summary.ended == 0.5
    with pytest.raises(ValueError, match="no completions"):
        summarise([], lambda index, ids: True)


def test_wilson_interval_is_the_published_one() -> None:
    low, high = wilson_interval(450, 500)
    assert (round(low, 4), round(high, 4)) == (0.8706, 0.9233)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0


def test_aup_by_hand() -> None:
    assert accuracy_under_parallelism([(1.0, 80.0)]) == 80.0
    weight = 78 * math.exp(-3 * (1 - 78 / 80))
    expected = 80 + 2 * (80 + weight) / 2
    assert accuracy_under_parallelism([(3.0, 78.0), (1.0, 80.0), (9.0, 70.0)]) == pytest.approx(expected)
    assert accuracy_under_parallelism([(1.0, 80.0), (2.0, 80.0)]) == pytest.approx(160.0)


def test_commit_order_counts_columns_by_forward() -> None:
    heat = commit_order([completion(3, 2, None, [1, 2, 2]), completion(2, 2, None, [2, 1])], 3)
    assert np.array_equal(heat, [[0.5, 0.5, 0.0], [0.5, 0.5, 0.5]])


def test_plots_are_pictures(tmp_path: Path) -> None:
    plot_speed_accuracy({"a": [(1.0, 80.0), (2.0, 79.0)], "b": [(3.0, 70.0)]}, tmp_path / "curve.png")
    plot_commit_order({"a": np.eye(4), "b": np.ones((3, 4))}, tmp_path / "order.png")
    for name in ("curve.png", "order.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
