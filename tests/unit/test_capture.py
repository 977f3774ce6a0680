"""Captured requests: read back as trajectories, bounded, and trained on where drafts were rejected."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.draft_tools import record
from unmask.capture import REJECTED, CaptureWriter
from unmask.objectives.drafting import choose_anchors
from unmask.training.sequences import SequenceSet, TokenSequence
from unmask.training.texts import read_trajectory_texts
from unmask.trajectories import read_trajectories


def test_requests_come_back_with_the_anchors_of_rejections(tmp_path: Path) -> None:
    writer = CaptureWriter(tmp_path / "trajectories", record(), rows_per_shard=2)
    # Blocks start at 0 (whole), 4 (one accepted), 6 (none), 7 (whole, the end).
    writer.add([5, 6], list(range(10, 21)), accepted=[3, 1, 0, 3], k=3)
    assert not list(tmp_path.rglob("*.parquet"))
    writer.add([7], [8, 9], accepted=[0], k=3)
    writer.add([7, 7], [9, 9, 9], accepted=[0, 0], k=3)
    writer.flush()
    rows = list(read_trajectories(tmp_path))
    assert [row.prompt_ids for row in rows] == [[5, 6], [7], [7, 7]]
    assert rows[0].response_ids == list(range(10, 21))
    assert [row.meta[REJECTED] for row in rows] == [[4, 6], [0], [0, 1]]
    assert rows[0].num_forwards == 5
    texts = read_trajectory_texts(tmp_path, verified=False)
    assert [t.anchors for t in texts] == [(6, 8), (1,), (2, 3)]


def test_the_oldest_shards_give_way_and_a_restart_goes_on(tmp_path: Path) -> None:
    directory = tmp_path / "trajectories"
    for first in (0, 10):
        writer = CaptureWriter(directory, record(), rows_per_shard=1, max_bytes=20_000)
        for number in range(first, first + 10):
            writer.add([number], [3] * 8, accepted=[7], k=7)
    prompts = [row.prompt_ids[0] for row in read_trajectories(tmp_path)]
    assert prompts == list(range(20 - len(prompts), 20))
    assert 1 < len(prompts) < 20
    assert sum(p.stat().st_size for p in directory.rglob("*.parquet")) <= 20_000


def test_rejected_anchors_are_drawn_first() -> None:
    sequences = SequenceSet([TokenSequence(tuple(range(2, 32)), 4, anchors=(9, 17, 20))], batch_size=1, seed=0)
    batch = sequences.batch((0,))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        chosen = choose_anchors(batch.response_BT, 5, generator, batch.first_BT)[0].tolist()
        assert {9, 17, 20} <= set(chosen)
        assert len(set(chosen)) == 5
