"""A target and a draft with a mailbox between them, and the draft's twin that is told of rows that have come."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tests.mailbox_tools import LAYOUT, TargetStep
from tests.pairing_tools import SECRET, SHAPE, eventually, tiny_draft, tiny_vocabulary
from unmask.pairing.ahead_step import AheadStep, Booking
from unmask.pairing.batcher import Batcher
from unmask.pairing.draft_engine import DraftEngine
from unmask.pairing.graphed_blocks import GraphedBlocks
from unmask.pairing.link_file import LinkConfig, write_link_file
from unmask.pairing.local_drafting import LocalDrafting
from unmask.pairing.mailbox import Mailbox
from unmask.pairing.mailbox_reader import MailboxService
from unmask.pairing.mailbox_target import MailboxTarget
from unmask.pairing.mailbox_words import HEARTBEAT
from unmask.pairing.server import DraftServer
from unmask.pairing.sidecar import Sidecar
from unmask.pairing.stream_end import SeenStep
from unmask.pairing.stream_words import HostWords
from unmask.pairing.wire import Step, as_rows, pack_rows
from unmask.types import ProposalRow


def new_engine(cls: type[DraftEngine], device: str, **changes: object) -> DraftEngine:
    vocabulary = tiny_vocabulary().to(device)
    return cls(tiny_draft(**changes).to(device), vocabulary, vocabulary, memory_mb=2, page_size=4, graph_ks=range(1, 6))


class CountingEngine(DraftEngine):
    """Counts what was queued ahead; on a CPU it runs the graphs' passes eagerly."""

    ahead_steps = 0

    def _new_blocks(self, draft, cache, confidence):
        if draft.fc.weight.is_cuda:
            return super()._new_blocks(draft, cache, confidence)
        return GraphedBlocks(draft, self._embedding, self._lm_head, cache)

    def book(self, step: AheadStep, seen: SeenStep) -> Booking:
        self.ahead_steps += 1
        return super().book(step, seen)


class Pair:
    """See above; the target is a thread of the caller's on a CPU, the draft wherever it is put."""

    def __init__(self, folder: Path, device: str = "cpu", rows: torch.dtype = LAYOUT.dtype, **changes: object) -> None:
        self.mailbox = Mailbox.create(folder / "box", replace(LAYOUT, dtype=rows))
        self.engine = new_engine(CountingEngine, device, **changes)
        self.twin = new_engine(DraftEngine, device, **changes)
        self.target = MailboxTarget(self.mailbox, HostWords(self.mailbox), SHAPE, torch.device("cpu"))
        self.numbers: dict[str, int] = {}
        self.finished: list[int] = []
        self.steps = 0
        self.on_exit = ExitStack()

    def open(self) -> None:
        """Serve the mailbox on this host."""
        self.batcher = Batcher(self.engine, on_end=lambda: None)
        self.batcher.start()
        self.on_exit.callback(self.batcher.stop)
        self.drafting = LocalDrafting(self.engine, self.batcher, itertools.count().__next__)
        theirs = Mailbox(self.mailbox.path)
        self.drafting.open(theirs)
        self.on_exit.callback(self.drafting.close)
        service = MailboxService(theirs, self.drafting)
        service.start()
        self.on_exit.callback(service.close)

    def __enter__(self) -> Pair:
        self.open()
        self.target.start()
        self.mailbox.set_long_word(HEARTBEAT, time.monotonic_ns() + 3600 * 10**9)
        eventually(lambda: self.target.is_ready, 20)
        # A sidecar has tried its draft, in a session that asks nothing more.
        self.before = self.batcher.steps
        self.batcher._asked_at.clear()
        return self

    def __exit__(self, *_) -> None:
        self.target.close()
        self.on_exit.close()

    def ask(self, step: TargetStep, k: int, hashes: Sequence[Sequence[int]] = ()) -> list[list[int]]:
        tokens = self.target.propose(step.names, step.states, step.tensors, coming=step.coming, k=k, hashes=hashes)[
            :, :k
        ].tolist()
        # The draft takes note of a step after its reply.
        eventually(lambda: self.batcher.steps - self.before == self.target.asked)
        return tokens

    def ask_twin(self, step: TargetStep, k: int) -> list[list[int]]:
        rows = [
            ProposalRow(
                request=self.numbers.setdefault(name, len(self.numbers)),
                start=start,
                num_features=len(raw),
                last_token=anchor,
            )
            for name, start, raw, anchor in step.seen
        ]
        self.steps += 1
        projected = self.engine.hello.projection.to("cpu")(torch.cat([raw for *_, raw, _ in step.seen]))
        finished, self.finished = self.finished, []
        asked = Step(
            draft_version=self.twin.version,
            epoch=0,
            number=self.steps,
            num_speculative_tokens=k,
            rows=pack_rows(rows),
            features=as_rows(projected, self.mailbox.layout.dtype).to(projected.dtype),
            finished=np.array(finished, dtype="<u8"),
        )
        (reply,) = self.twin.step([(0, asked)])
        kept = np.arange(k) < reply.counts[:, None]
        return np.where(kept, reply.tokens, -1).tolist()

    def finish(self, names: list[str]) -> None:
        self.target.finish(names)
        self.finished += [self.numbers[name] for name in names if name in self.numbers]


class RelayedPair(Pair):
    """The draft on another host: a sidecar, TCP, and the draft's server."""

    boxes: Path | None = None

    def open(self) -> None:
        """Serve the mailbox through a sidecar."""
        folder = self.mailbox.path.parent
        self.server = self.new_server()
        self.batcher = self.server._batcher
        self.on_exit.callback(lambda: self.server.stop())
        (folder / "secret").write_bytes(SECRET)
        self.write_link()
        sidecar = Sidecar(self.mailbox.path, folder / "link", SHAPE)
        sidecar.start()
        self.on_exit.callback(sidecar.close)

    def new_server(self) -> DraftServer:
        """Started, with this pair's engine."""
        vocabulary = tiny_vocabulary()
        server = DraftServer(tiny_draft(), vocabulary, vocabulary, SECRET, memory_mb=2, mailbox_folder=self.boxes)
        server._engine, server._relays = self.engine, True
        server._batcher._engine = self.engine
        server.start()
        return server

    def write_link(self) -> None:
        """Name the server."""
        folder = self.mailbox.path.parent
        link = LinkConfig(
            address=self.server.address,
            secret_file=str(folder / "secret"),
            timeout_ms=10_000,
            retry_s=0.1,
            mailbox_folder=str(self.boxes) if self.boxes else None,
        )
        write_link_file(folder / "link", link)


class NeighbourPair(RelayedPair):
    """A draft of the same host, to which the sidecar hands the mailbox."""

    def open(self) -> None:
        """Serve the mailbox through the folder."""
        self.boxes = self.mailbox.path.parent / "boxes"
        super().open()
        eventually(lambda: list(self.boxes.glob("*.mailbox")), 20)
