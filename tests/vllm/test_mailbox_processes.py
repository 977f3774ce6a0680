"""A mailbox with its draft, sidecar and watchdog as real processes, which are stopped and killed; the test is the
target."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.mailbox_tools import LAYOUT, ImaginedTarget, TargetStep, watchdog
from tests.pairing_tools import BLOCK_SIZE, SECRET, SHAPE, eventually, tiny_draft, tiny_vocabulary
from unmask.checkpoints import save_draft
from unmask.pairing.client import DraftLink
from unmask.pairing.coming_rows import ComingRows
from unmask.pairing.link_file import LinkConfig, read_link_file, write_link_file
from unmask.pairing.mailbox import Mailbox
from unmask.pairing.mailbox_folder import new_path
from unmask.pairing.mailbox_target import MailboxTarget
from unmask.pairing.mailbox_words import HEARTBEAT, LATE, RELEASED, REPLY
from unmask.pairing.packed_rows import StepTensors
from unmask.pairing.stream_words import HostWords
from unmask.types import ProposalRow

K = BLOCK_SIZE - 1
LIMIT_MS = 300.0
ROOT = Path(__file__).parents[2]


@dataclass
class Side:
    """A draft process, whatever is in front of it, and the target's end of the mailbox."""

    directory: Path
    mailbox: Mailbox
    target: MailboxTarget
    processes: dict[str, subprocess.Popen]

    def ask(self, step: TargetStep) -> list[list[int]]:
        tokens = self.target.propose(step.names, step.states, step.tensors, coming=step.coming, k=K)
        return [[token for token in ids if token >= 0] for ids in tokens.tolist()]

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.processes[name].pid, number)
        if number == signal.SIGKILL:
            self.processes[name].wait(10)

    def start(self, name: str) -> None:
        options = {
            "draft": ["server", *(f"--{o}={self.directory / o.split('-')[0]}" for o in FILES)],
            "sidecar": ["sidecar", f"--mailbox={self.mailbox.path}", f"--link-file={self.directory / 'link'}"],
        }[name]
        if name == "draft" and self.mailbox.path.parent.name == "boxes":
            options += [f"--mailbox-folder={self.directory / 'boxes'}"]
        if name == "sidecar":
            options += [f"--vocab-size={SHAPE.vocab_size}", "--layer-ids", *map(str, SHAPE.layer_ids)]
        command = [sys.executable, "-m", f"unmask.pairing.{options[0]}", *options[1:]]
        (self.directory / "address").unlink(missing_ok=True) if name == "draft" else None
        self.processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT)

    def follow_draft(self) -> None:
        """Write the link file of a draft that has just been started."""
        eventually((self.directory / "address").exists, 180)
        found = read_link_file(self.directory / "address")
        write_link_file(self.directory / "link", replace(found, timeout_ms=30_000, retry_s=0.1))


FILES = ("draft", "target", "secret-file", "address-file")


@pytest.fixture(params=["sidecar", pytest.param("same host", marks=pytest.mark.slow)])
def side(request, tmp_path: Path) -> Iterator[Side]:
    save_draft(tiny_draft(), tmp_path / "draft", None, dtype=torch.float32)
    (tmp_path / "target").mkdir()
    save_file({"model.embed_tokens.weight": tiny_vocabulary()}, tmp_path / "target" / "model.safetensors")
    (tmp_path / "secret").write_bytes(SECRET)
    folder = tmp_path / ("boxes" if request.param == "same host" else "own")
    folder.mkdir()
    write_link_file(tmp_path / "link", LinkConfig(address=None, secret_file=str(tmp_path / "secret")))
    mailbox = Mailbox.create(new_path(folder), LAYOUT)
    target = MailboxTarget(mailbox, HostWords(mailbox), SHAPE, torch.device("cpu"))
    target.start()
    side = Side(tmp_path, mailbox, target, {})
    with ExitStack() as stack:
        side.start("draft")
        if request.param == "sidecar":
            side.start("sidecar")
        stack.enter_context(watchdog(mailbox, LIMIT_MS))
        side.follow_draft()
        eventually(lambda: target.is_ready, 180)
        yield side
        target.close()
        for process in side.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.stdin.close()
                process.wait(20)
    mailbox.remove()


def test_blocks_are_the_direct_links_and_a_draft_that_stops_or_dies_costs_no_more_than_the_limit(side: Side) -> None:
    link = DraftLink(side.directory / "link", SHAPE, K)
    link.start()
    assert link.wait_until_ready(20)
    imagined, numbers = ImaginedTarget(seed=11), {}
    for _ in range(40):
        step = imagined.step()
        rows = [
            ProposalRow(
                request=numbers.setdefault(name, len(numbers)), start=start, num_features=len(raw), last_token=anchor
            )
            for name, start, raw, anchor in step.seen
        ]
        gone = imagined.end()
        direct = link.propose(rows, torch.cat([raw for *_, raw, _ in step.seen]), [])
        assert side.ask(step) == direct
        side.target.finish(gone)
    assert side.target.passed == 0
    link.close()

    # What the target waits for stands still: it is let go, and asks no more until somebody polls again.
    probe = one_request()
    block = side.ask(probe)
    assert len(block[0]) == K
    for released, name in enumerate(side.processes, 1):
        side.signal(name, signal.SIGSTOP)
        started = time.monotonic()
        assert side.ask(probe) == [[]]
        assert time.monotonic() - started >= LIMIT_MS / 1000
        assert side.mailbox.word(RELEASED) == released
        reply = side.mailbox.word(REPLY)
        assert not side.target.is_ready
        side.signal(name, signal.SIGCONT)
        eventually(lambda: side.target.is_ready, 30)
        assert side.mailbox.word(REPLY) == reply
        assert side.ask(one_request()) == block
    # Through the sidecar the stopped draft's answer came after all, and was dropped.
    assert side.mailbox.word(LATE) >= ("sidecar" in side.processes)

    # It is killed, and another takes its place.
    for name in side.processes:
        side.signal(name, signal.SIGKILL)
    for _ in range(3):
        assert side.ask(probe) == [[]]
    for name in list(side.processes):
        side.start(name)
    side.follow_draft()
    eventually(lambda: side.target.is_ready, 180)
    assert side.ask(one_request()) == block


def one_request() -> TargetStep:
    """A new request with the same 9 rows as all others."""
    generator = torch.Generator().manual_seed(1)
    one_request.born = getattr(one_request, "born", 0) + 1
    tensors = StepTensors(
        positions=torch.arange(9),
        query_starts=torch.tensor([0, 9]),
        num_sampled=torch.tensor([1]),
        num_rejected=torch.tensor([0]),
        slots=torch.tensor([0]),
        last_sampled=torch.tensor([[5]]),
    )
    states = [torch.randn(9, SHAPE.hidden_size, generator=generator) for _ in SHAPE.layer_ids]
    return TargetStep([f"probe-{one_request.born}"], states, tensors, ComingRows(np.array([9]), np.array([0])), [])


def test_without_a_watchdog_nothing_is_asked_that_could_hang(tmp_path: Path) -> None:
    mailbox = Mailbox.create(tmp_path / "box", LAYOUT)
    with watchdog(mailbox, LIMIT_MS) as process:
        eventually(lambda: mailbox.is_guarded, 60)
        process.kill()
        process.wait(10)
        eventually(lambda: not mailbox.is_guarded, 10)
    assert mailbox.long_word(HEARTBEAT) > 0
