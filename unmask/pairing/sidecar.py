"""The sidecar of a target on a GPU: carries its mailbox over the wire to drafts. Needs no GPU.

To the target it is a draft that maps the same memory. Where a draft of this host is named, that is what it hands the
mailbox to, for as long as that draft is there. Timeouts, the breaker and the choice among several drafts are
those of `DraftFleet`; whatever goes wrong there is answered with no proposals. If the sidecar itself stands still, the
watchdog lets the target go on.

`python -m unmask.pairing.sidecar --mailbox FILE --link-file FILE --layer-ids 1 3 --vocab-size V` runs until its
standard input closes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from unmask.pairing.announcement import Announcement
from unmask.pairing.fleet import DraftFleet
from unmask.pairing.handover import Handover
from unmask.pairing.hello import NO_DIGEST, Hello, TargetShape
from unmask.pairing.link_file import read_link_file
from unmask.pairing.mailbox import Control, Mailbox
from unmask.pairing.mailbox_reader import Asked, MailboxService
from unmask.pairing.mailbox_words import OFFERED
from unmask.pairing.polling import Attention
from unmask.pairing.status import LinkStatus, read_status
from unmask.pairing.step_watch import Watch
from unmask.pairing.wire import EIGHT_BIT
from unmask.pairing.wire_end import WireEnd


class Sidecar:
    """Answers a mailbox with the drafts of a link file.

    Args:
        mailbox: path of the target's mailbox.
        link_file: see `unmask.pairing.link_file`.
        shape: what the target is.

    Raises:
        WireError: not a mailbox.
        ConfigError: no link file to be read.
        OSError: no mailbox there.
    """

    def __init__(self, mailbox: str | Path, link_file: str | Path, shape: TargetShape) -> None:
        box = Mailbox(mailbox)
        config = read_link_file(link_file)
        before = (read_status(config.status_file) if config.status_file else None) or {}
        status = LinkStatus(config.status_file)
        self.fleet = DraftFleet(link_file, shape, box.layout.max_k, status=status)
        self._layout = box.layout
        self._box, self._handover = box, Handover(box)
        self._handover.adopt(config.mailbox_folder)
        self._context = self._whose_context()
        self.fleet.begin_epoch(before.get("epoch", 0.0))
        self._service = MailboxService(box, self, attention=Attention(spins=None))

    def start(self) -> None:
        """Connect and begin to answer."""
        self.fleet.start()
        self._service.start()

    def close(self) -> None:
        """Answer nothing more, and hang up."""
        self._service.close()
        self._handover.take_back()
        self.fleet.close()

    @property
    def answered(self) -> int:
        """Steps that were answered in time."""
        return self._service.answered

    @property
    def hello(self) -> Hello | None:
        """See `Proposer.hello`."""
        return self.fleet.hello

    def look_around(self) -> None:
        """Give the mailbox to a draft of this host, or take it back from one that is gone."""
        self._handover.follow(self.fleet.mailbox_folder)
        if self._context != self._whose_context():
            # Prefixes that the target has cached were seen by a draft that is not asked any more.
            self._context = self._whose_context()
            self.fleet.leave()
            self.fleet.begin_epoch()

    @property
    def is_elsewhere(self) -> bool:
        """See `Proposer.is_elsewhere`."""
        return self._handover.is_given

    def _whose_context(self) -> tuple[bool, int]:
        """Changes whenever another draft, or another session of it, holds the context. Over the wire a new greeting
        tells of it."""
        is_given = self._handover.is_given
        return is_given, self._box.long_word(OFFERED) if is_given else 0

    def propose(self, asked: Asked) -> tuple[np.ndarray, np.ndarray]:
        """See `Proposer.propose`; the rows are sent from where the GPU has put them."""
        return self.fleet.ask(
            asked.rows, asked.page_hashes, asked.features, asked.finished, asked.k, asked.draft_version
        )

    def ahead(self, control: Control, finished: Sequence[int], watch: Watch) -> bool:
        """See `Proposer.ahead`: what is sent must have been written, but a draft on a GPU can be told of it."""
        hello = self.fleet.hello
        if hello is None or control.num_hashes is not None:
            # Only a step is sent with hashes.
            return False
        if self._layout.dtype not in (hello.projection.fc.dtype, EIGHT_BIT):
            # They are sent as they lie.
            return False
        k = self.fleet.announce(
            Announcement(
                number=control.number,
                draft_version=control.draft_version,
                num_speculative_tokens=control.num_speculative_tokens,
                requests=control.requests,
                finished=np.array(finished, dtype=np.uint64),
                coming=control.coming,
                max_requests=self._layout.max_requests,
                max_rows=self._layout.max_rows,
                dtype=self._layout.dtype,
            )
        )
        if not k:
            return False
        ask = partial(self.fleet.ask_announced, control, k)
        end = WireEnd(self._box, control, ask)
        watch.until_done(end)
        if not end.is_intact:
            self.forget()
        # One that rings after all is sent as any other.
        return not end.was_let_go

    def forget(self) -> None:
        """See `Proposer.forget`."""
        self.fleet.hang_up()


def target_shape(
    hidden_size: int, vocab_size: int, layer_ids: Sequence[int], link_file: str | Path | None
) -> TargetShape:
    """A target of these sizes, with the identity that its link file names; without one it is anybody's."""
    digest = bytes.fromhex(read_link_file(link_file).target_digest) if link_file else b""
    digest = digest or NO_DIGEST
    return TargetShape(hidden_size=hidden_size, vocab_size=vocab_size, layer_ids=tuple(layer_ids), target_digest=digest)


def main(argv: list[str] | None = None) -> None:
    """Run until standard input closes, which it does when the target's process ends."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    parser = argparse.ArgumentParser(prog="python -m unmask.pairing.sidecar", description=main.__doc__)
    parser.add_argument("--mailbox", type=Path, required=True)
    parser.add_argument("--link-file", type=Path, required=True)
    parser.add_argument("--layer-ids", type=int, nargs="+", required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    arguments = parser.parse_args(argv)
    width = Mailbox(arguments.mailbox).layout.width
    shape = target_shape(width, arguments.vocab_size, arguments.layer_ids, arguments.link_file)
    sidecar = Sidecar(arguments.mailbox, arguments.link_file, shape)
    sidecar.start()
    while os.read(sys.stdin.fileno(), 4096):
        continue
    sidecar.close()


if __name__ == "__main__":
    main()
