"""Captured requests: read back as trajectories, bounded, and trained on where drafts were rejected."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from tests.draft_tools import record
from tests.pairing_tools import eventually
from unmask.capture import (
    ACCEPTED,
    CACHED,
    REJECTED,
    Capture,
    CaptureFolder,
    captured,
    collect,
    is_captured,
    read_captured,
)
from unmask.errors import UserError
from unmask.objectives.drafting import choose_anchors
from unmask.training.sequences import SequenceSet, TokenSequence
from unmask.training.texts import read_trajectory_texts
from unmask.trajectories import read_trajectories
from unmask.types import ServedRequest


def request(prompt: list[int], response: list[int], accepted: list[int], drafted: int = 3) -> ServedRequest:
    return ServedRequest(
        prompt_ids=prompt,
        response_ids=response,
        finish_reason="length",
        num_forwards=len(accepted) + 1,
        accepted=accepted,
        drafted=[drafted] * len(accepted),
        cached_tokens=len(prompt),
    )


def test_requests_come_back_with_the_anchors_of_rejections(tmp_path: Path) -> None:
    # Blocks start at 0 (whole), 4 (one accepted), 6 (none), 7 (whole, the end).
    requests = [
        request([5, 6], list(range(10, 21)), accepted=[3, 1, 0, 3]),
        request([7], [8, 9], accepted=[0]),
        request([7, 7], [9, 9, 9], accepted=[0, 0]),
        # A step without a draft in between: where the second block began is not known.
        request([8], [9] * 9, accepted=[2, 3]),
        request([9], [9, 9], accepted=[]),
    ]
    CaptureFolder(tmp_path / "trajectories", record()).write(requests)
    rows = list(read_trajectories(tmp_path))
    assert [(row.prompt_ids, row.response_ids) for row in rows] == [(r.prompt_ids, r.response_ids) for r in requests]
    assert [row.meta[REJECTED] for row in rows] == [[4, 6], [0], [0, 1], [], []]
    assert [row.meta[ACCEPTED] for row in rows] == [r.accepted for r in requests]
    assert (rows[0].num_forwards, rows[0].finish_reason, rows[0].meta[CACHED]) == (5, "length", 2)
    texts = read_trajectory_texts(tmp_path, verified=False)
    assert [t.anchors for t in texts] == [(6, 8), (1,), (2, 3), (), ()]


def test_the_oldest_shards_give_way_and_a_restart_goes_on(tmp_path: Path) -> None:
    directory = tmp_path / "trajectories"
    for first in (0, 10):
        folder = CaptureFolder(directory, record(), max_bytes=20_000)
        for number in range(first, first + 10):
            folder.write([request([number], [3] * 8, accepted=[7], drafted=7)])
    prompts = [row.prompt_ids[0] for row in read_trajectories(tmp_path)]
    assert prompts == list(range(20 - len(prompts), 20))
    assert 1 < len(prompts) < 20
    assert folder.size == sum(p.stat().st_size for p in directory.rglob("*.parquet")) <= 20_000


def capture(root: Path, **changes: float) -> Capture:
    return Capture(root, record(), **({"max_bytes": 2**20, "flush_s": 0.05} | changes))  # type: ignore[arg-type]


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_folders_that_others_could_read_are_closed(tmp_path: Path) -> None:
    root, run_dir = tmp_path / "captured", tmp_path / "run"
    for folder in (root / "writer-0", run_dir / "trajectories"):
        folder.mkdir(parents=True)
        folder.chmod(0o755)
        folder.parent.chmod(0o755)
    writer = capture(root)
    writer.add(request([6], [3] * 8, accepted=[7], drafted=7))
    writer.stop()
    assert writer.stats.written == 1
    assert collect(root, run_dir) == 1
    assert [mode(folder) for folder in (root, root / "writer-0", run_dir / "trajectories")] == [0o700] * 3


@pytest.mark.parametrize("refuses", [True, False])
def test_nothing_is_captured_where_others_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refuses: bool
) -> None:
    """Another user's folder cannot be closed; a file system without modes does not say so."""

    def chmod(path: Path, mode: int) -> None:
        if refuses:
            raise PermissionError("not yours")

    root = tmp_path / "captured"
    root.mkdir()
    root.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "chmod", chmod)
        writer = capture(root)
        writer.add(request([6], [3] * 8, accepted=[7], drafted=7))
        writer.stop()
    assert (writer.stats.written, writer.stats.failed) == (0, 1)
    assert "cannot be kept from other users" in caplog.text
    assert not list(root.rglob("*.parquet"))


def test_writers_share_a_root_and_a_run_is_made_of_what_is_new(tmp_path: Path) -> None:
    root = tmp_path / "captured"
    writers = [capture(root), capture(root)]
    for number, writer in enumerate(writers):
        writer.add(request([number], [3] * 8, accepted=[7], drafted=7))
    eventually(lambda: len(captured(root)) == 2)
    before = frozenset(captured(root))
    assert {shard.parents[1].name for shard in before} == {"writer-0", "writer-1"}
    writers[0].add(request([2], [3] * 8, accepted=[7], drafted=7))
    for writer in writers:
        writer.stop()
    assert [writer.stats.written for writer in writers] == [2, 1]
    assert {path.name for path in root.iterdir()} == {"writer-0", "writer-1"}
    assert root.stat().st_mode & 0o077 == 0
    assert collect(root, tmp_path / "run", without=before) == 1
    assert is_captured(tmp_path / "run")
    assert sorted(row.prompt_ids[0] for row in read_captured(root, without=before)) == [2]
    assert [row.prompt_ids for row in read_trajectories(tmp_path / "run")] == [[2]]
    assert collect(root, tmp_path / "run") == 3
    with pytest.raises(UserError, match="nothing new was captured"):
        collect(root, tmp_path / "run", without=frozenset(captured(root)))
    # A writer that comes back takes over a folder that nobody holds.
    again = capture(root)
    again.add(request([4], [3] * 8, accepted=[7], drafted=7))
    again.stop()
    assert sorted(row.prompt_ids[0] for row in read_captured(root)) == [0, 1, 2, 4]
    assert len(list(root.iterdir())) == 2


def test_a_disk_that_cannot_be_written_fails_no_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "captured"
    root.write_text("a file is in the way")
    writer = capture(root)
    writer.add(request([77777], [88888] * 8, accepted=[7], drafted=7))
    eventually(lambda: writer.stats.failed == 1)
    assert "77777" not in caplog.text
    assert "88888" not in caplog.text
    root.unlink()
    writer.add(request([6], [3] * 8, accepted=[7], drafted=7))
    writer.stop()
    assert (writer.stats.written, writer.stats.failed, writer.stats.dropped) == (1, 1, 0)
    assert writer.stats.size == sum(p.stat().st_size for p in root.rglob("*.parquet"))


def test_a_disk_that_is_slow_drops_requests_and_holds_up_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, freed = threading.Event(), threading.Event()
    write = CaptureFolder.write

    def write_slowly(folder: CaptureFolder, rows: list[ServedRequest]) -> None:
        entered.set()
        freed.wait(30)
        write(folder, rows)

    monkeypatch.setattr(CaptureFolder, "write", write_slowly)
    writer = capture(tmp_path, flush_s=1e-9)
    one = request([6], [3] * 8, accepted=[7], drafted=7)
    writer.add(one)
    assert entered.wait(30)
    for _ in range(1100):
        writer.add(one)
    assert writer.stats.dropped == 1100 - 1024
    freed.set()
    writer.stop(30)
    assert writer.stats.written == 1025


def test_rejected_anchors_are_drawn_first() -> None:
    sequences = SequenceSet([TokenSequence(tuple(range(2, 32)), 4, anchors=(9, 17, 20))], batch_size=1, seed=0)
    batch = sequences.batch([(0,)])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        chosen = choose_anchors(batch.response_BT, 5, generator, batch.first_BT)[0].tolist()
        assert {9, 17, 20} <= set(chosen)
        assert len(set(chosen)) == 5
