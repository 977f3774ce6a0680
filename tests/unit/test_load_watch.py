from __future__ import annotations

import numpy as np
import pytest
import torch

from engines.draft_arguments import first_spans, graphs_of
from engines.load_watch import LoadWatch
from unmask.pairing.graphed_blocks import halvings


class ImaginedLoad:
    """Steps whose verification takes `fixed_s`, and `row_s` a row; drafts are right with a chance of `rate`."""

    def __init__(self, monkeypatch, fixed_s: float, row_s: float, rate: float) -> None:
        self.fixed_s, self.row_s, self.rate = fixed_s, row_s, rate
        self.now_s = 0.0
        self.generator = np.random.default_rng(0)
        monkeypatch.setattr("engines.load_watch.time.perf_counter", lambda: self.now_s)
        self.table = [15] * 65
        self.watch = LoadWatch([3, 7, 15], self.table, torch.device("cpu"))

    def run(self, batch_size: int, steps: int) -> None:
        for _ in range(steps):
            k = self.table[batch_size]
            hits = self.generator.random((batch_size, k)) < self.rate
            sampled = 1 + np.cumprod(hits, axis=1).sum(axis=1)
            self.watch.begin(np.full(batch_size, k + 1), k, torch.from_numpy(sampled))
            self.now_s += 1e-3 + 1e-6 * batch_size * (k + 1)
            self.watch.answered()
            self.now_s += self.fixed_s + self.row_s * batch_size * (k + 1)
            self.table = self.watch.poll() or self.table


def test_more_is_drafted_where_rows_cost_nothing_and_drafts_are_right(monkeypatch) -> None:
    load = ImaginedLoad(monkeypatch, fixed_s=8e-3, row_s=0.0, rate=0.86)
    load.run(4, 600)
    assert load.table == [15] * 65


def test_less_is_drafted_under_load_and_where_drafts_are_wrong(monkeypatch) -> None:
    load = ImaginedLoad(monkeypatch, fixed_s=6e-3, row_s=2e-5, rate=0.8)
    load.run(64, 800)
    assert load.table[64] < 15
    # Nothing has been seen of small batches.
    assert load.table[1:9] == [15] * 8
    wrong = ImaginedLoad(monkeypatch, fixed_s=6e-3, row_s=2e-5, rate=0.2)
    wrong.run(64, 800)
    assert wrong.table[64] == 3


@pytest.mark.parametrize("row_s", [4e-6, 9e-6])
def test_a_full_batch_that_starts_with_little_comes_to_the_k_that_pays(monkeypatch, row_s: float) -> None:
    """What is never chosen is never measured: between 3 and 7 half of a step's time is taken for the rows' own."""
    load = ImaginedLoad(monkeypatch, fixed_s=8e-3, row_s=row_s, rate=0.86)
    load.table = load.watch.table = [3] * 65
    chosen = []
    for _ in range(40):
        load.run(64, 32)
        chosen.append(load.table[64])

    def rate(k: int) -> float:
        return (1 - 0.86 ** (k + 1)) / (9e-3 + (row_s + 1e-6) * 64 * (k + 1))

    best = max((3, 7, 15), key=rate)
    assert best > 3
    assert chosen[-1] == best
    # Of what is larger, trials alone: some 32 measurements each, of which each fourth step is one.
    assert sum(k > best for k in chosen) * 32 <= 2 * 4 * 32 + 32


def test_nothing_is_tried_where_drafts_are_wrong(monkeypatch) -> None:
    load = ImaginedLoad(monkeypatch, fixed_s=8e-3, row_s=4e-6, rate=0.2)
    load.table = load.watch.table = [3] * 65
    for _ in range(20):
        load.run(64, 64)
        assert load.table[64] == 3


def test_steps_with_prompts_say_nothing(monkeypatch) -> None:
    load = ImaginedLoad(monkeypatch, fixed_s=6e-3, row_s=2e-5, rate=0.8)
    for _ in range(200):
        load.watch.begin(np.array([16, 100]), 15, torch.tensor([3, 1]))
        load.watch.answered()
        assert load.watch.poll() is None
    assert load.watch.controller.costs["verify"].seconds(np.array([16])) is None


def test_what_follows_a_step_is_no_cost_of_its_rows(monkeypatch) -> None:
    """Prompts that come in, and the pause before the next batch."""
    load = ImaginedLoad(monkeypatch, fixed_s=6e-3, row_s=2e-5, rate=0.8)
    for i in range(200):
        load.run(8, 4 + i % 3)
        load.now_s += 0.05 if i % 2 else 1.0
        load.watch.begin(np.array([16] * 8 + [100]), 15, torch.ones(9, dtype=torch.int32))
        load.watch.answered()
        load.now_s += 8.56e-3
    verify = load.watch.controller.costs["verify"].seconds(np.array([8 * 16]))
    assert verify is not None
    assert verify[0] == pytest.approx(6e-3 + 2e-5 * 8 * 16)


@pytest.mark.parametrize(
    ("k", "most", "expected"),
    [
        (15, 1, ((1, 1, 15),)),
        (15, 2, ((1, 1, 15), (2, 2, 3))),
        (15, 8, ((1, 6, 15), (7, 7, 7), (8, 8, 3))),
        (15, 64, ((1, 16, 15), (17, 63, 7), (64, 64, 3))),
        (15, 256, ((1, 16, 15), (17, 128, 7), (129, 256, 3))),
        (1, 20, ((1, 16, 1), (17, 19, 1), (20, 20, 1))),
    ],
)
def test_first_spans_reach_to_the_largest_batch(k: int, most: int, expected: tuple) -> None:
    assert first_spans(k, most) == expected


def test_the_draft_has_graphs_for_every_k_of_the_first_spans() -> None:
    for k in range(1, 32):
        for most in (1, 2, 16, 64, 300):
            assert {least for *_, least in first_spans(k, most)} <= set(halvings(k))


def test_every_k_has_a_graph_for_full_batches() -> None:
    graphs = graphs_of(48, {15, 7})
    sizes = graphs["cudagraph_capture_sizes"]
    assert {48 * 16, 48 * 8, 16, 8} <= set(sizes)
    # Beside a full batch there is room for prompts.
    assert [size - 48 * 16 for size in sizes if size > 48 * 16] == [64, 128, 256, 512]
    # vLLM leaves out what goes beyond `max_num_batched_tokens`, but not if it is said to be the largest.
    assert graphs.keys() == {"cudagraph_mode", "cudagraph_capture_sizes"}
    assert sizes == sorted(set(sizes))


def test_steps_with_prompts_have_graphs_too() -> None:
    graphs = graphs_of(8, {0})
    assert graphs["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    assert graphs["cudagraph_capture_sizes"] == [1, 2, 4, 8, 72, 96, 128, 136, 192, 256, 264, 384, 512, 520]


def test_a_draft_that_is_away_for_a_while_is_no_cost(monkeypatch) -> None:
    load = ImaginedLoad(monkeypatch, fixed_s=6e-3, row_s=2e-5, rate=0.8)
    for _ in range(100):
        # A sample in every fourth step, then an outage in the midst of one.
        load.run(8, 8)
        load.watch.skip()
        load.now_s += 3.0
    assert load.watch.controller.costs["verify"].seconds(np.array([8 * 16]))[0] < 0.05
    load.run(8, 40)
