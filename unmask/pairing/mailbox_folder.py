"""A folder of shared memory in which targets of this host leave their mailboxes, and a draft that serves them all."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from unmask.errors import UserError, WireError
from unmask.files import private_folder
from unmask.pairing.local_drafting import LocalDrafting
from unmask.pairing.mailbox import SUFFIX, Mailbox, is_orphaned, remove_files
from unmask.pairing.mailbox_reader import MailboxService

logger = logging.getLogger(__name__)

_LOOK_S = 0.1


class MailboxFolder:
    """Serves every mailbox of a folder for as long as its target lives.

    Args:
        path: the folder; see `private_folder`.
        new_drafting: makes what answers one mailbox.

    Raises:
        ConfigError: other users can write there.
    """

    def __init__(self, path: Path, new_drafting: Callable[[], LocalDrafting]) -> None:
        self._path, self._new_drafting = private_folder(path), new_drafting
        self._served: dict[Path, tuple[MailboxService, LocalDrafting]] = {}
        self._refused: set[Path] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mailbox_folder", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Serve none any more."""
        self._closing.set()
        self._thread.join()
        for path in list(self._served):
            self._drop(path)

    def _follow(self) -> None:
        while not self._closing.is_set():
            try:
                self._look()
            except (OSError, UserError, RuntimeError) as error:
                # Such as a device that has failed: nothing of it must keep the others from being looked after.
                logger.error("mailboxes: %s", error)
            self._closing.wait(_LOOK_S)

    def _look(self) -> None:
        found = set(self._path.glob(f"*{SUFFIX}"))
        for path in sorted(found - self._served.keys() - self._refused):
            self._take(path)
        for path in [path for path in self._served if is_orphaned(path)]:
            remove_files(path)
            self._drop(path)
        for path in [path for path, (service, _) in self._served.items() if not service.is_alive]:
            logger.error("what served %s has ended; starting another", path.name)
            self._drop(path)

    def _take(self, path: Path) -> None:
        if is_orphaned(path):
            remove_files(path)
            return
        try:
            # Where it is a link, the draft's projection is laid beside the mailbox itself.
            mailbox = Mailbox(path.resolve())
        except (OSError, WireError) as error:
            logger.warning("%s is not served: %s", path.name, error)
            self._refused.add(path)
            return
        drafting = self._new_drafting()
        drafting.open(mailbox)
        service = MailboxService(mailbox, drafting)
        service.start()
        self._served[path] = service, drafting

    def _drop(self, path: Path) -> None:
        service, drafting = self._served.pop(path)
        service.close()
        drafting.close()


def new_path(folder: Path) -> Path:
    """A name for a new mailbox; what killed targets have left behind is cleared away."""
    for path in folder.glob(f"*{SUFFIX}"):
        if is_orphaned(path):
            remove_files(path)
    return folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}{SUFFIX}"
