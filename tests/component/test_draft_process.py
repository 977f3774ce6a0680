from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.pairing_tools import (
    BLOCK_SIZE,
    SECRET,
    SHAPE,
    raw_features,
    reference_block,
    row,
    tiny_draft,
    tiny_vocabulary,
)
from unmask.checkpoints import save_draft
from unmask.pairing.client import DraftLink
from unmask.pairing.status import FIELDS, LinkStatus, read_status


def test_a_process_serves_and_ends_with_its_input(tmp_path: Path) -> None:
    draft, vocabulary = tiny_draft(), tiny_vocabulary()
    save_draft(draft, tmp_path / "draft", None, dtype=torch.float32)
    (tmp_path / "target").mkdir()
    save_file({"model.embed_tokens.weight": vocabulary}, tmp_path / "target" / "model.safetensors")
    (tmp_path / "secret").write_bytes(SECRET)
    command = [sys.executable, "-m", "unmask.pairing.server"]
    for option in ("draft", "target", "secret-file", "address-file"):
        command += [f"--{option}", str(tmp_path / option.split("-")[0])]

    def start() -> subprocess.Popen:
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
        while not (tmp_path / "address").exists():
            assert process.poll() is None
            time.sleep(0.05)
        return process

    process = start()
    link = DraftLink(tmp_path / "address", SHAPE, BLOCK_SIZE - 1)
    link.start()
    assert link.wait_until_ready(10)
    raw = raw_features(9, seed=0)
    assert link.propose([row(1, 0, 9)], raw) == [reference_block(draft, vocabulary, raw, 1, BLOCK_SIZE - 1)]
    link.close()
    process.stdin.close()
    assert process.wait(20) == 0
    (tmp_path / "address").unlink()
    process = start()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_a_status_file_keeps_its_fields(tmp_path) -> None:
    assert read_status(tmp_path / "none") is None
    status = LinkStatus(tmp_path / "status")
    for index, name in enumerate(FIELDS):
        status[name] = index
        status.add(name, 0.5)
    assert read_status(tmp_path / "status") == {name: i + 0.5 for i, name in enumerate(FIELDS)}
    (tmp_path / "status").write_bytes(b"short")
    with pytest.raises(ValueError, match="not a status file"):
        read_status(tmp_path / "status")
