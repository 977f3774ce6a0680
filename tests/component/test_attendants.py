"""The watchdog of a mailbox, as a process that is looked after."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mailbox_tools import LAYOUT
from tests.pairing_tools import eventually
from unmask.pairing import attendants
from unmask.pairing.attendants import Attendants
from unmask.pairing.mailbox import Mailbox
from unmask.pairing.mailbox_words import HEARTBEAT


@pytest.fixture
def mailbox(tmp_path: Path) -> Mailbox:
    return Mailbox.create(tmp_path / "box", LAYOUT)


@pytest.fixture
def attended(mailbox: Mailbox) -> Iterator[Attendants]:
    attended = Attendants([["unmask.pairing.watchdog", str(mailbox.path)]])
    attended.start()
    eventually(lambda: mailbox.is_guarded, 20)
    yield attended
    attended.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_ends_or_is_stopped_is_replaced(
    attended: Attendants, mailbox: Mailbox, number: signal.Signals
) -> None:
    """Nobody else would end a GPU's wait."""
    before = attended._processes[0].pid
    os.kill(before, number)
    eventually(lambda: attended._processes[0].pid != before, 20)
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    # What it said last may be fresh yet: only another one says more.
    said = mailbox.long_word(HEARTBEAT)
    eventually(lambda: mailbox.long_word(HEARTBEAT) > said, 20)


def test_a_start_that_fails_is_tried_again(attended: Attendants, mailbox: Mailbox, monkeypatch) -> None:
    start, tries = attendants._start, []

    def failing(command: list[str]) -> Any:
        tries.append(command)
        if len(tries) < 3:
            raise BlockingIOError("Resource temporarily unavailable")
        return start(command)

    monkeypatch.setattr(attendants, "_start", failing)
    before = attended._processes[0]
    before.kill()
    eventually(lambda: attended._processes[0] is not before, 20)
    assert len(tries) == 3
    said = mailbox.long_word(HEARTBEAT)
    eventually(lambda: mailbox.long_word(HEARTBEAT) > said, 20)
