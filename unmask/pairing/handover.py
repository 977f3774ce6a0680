"""Letting a draft of this host serve a mailbox directly: a link to it in the folder that the draft watches."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from unmask.pairing.mailbox import SUFFIX, Mailbox
from unmask.pairing.mailbox_words import CONTROL, REPLY, SERVING, is_reached

logger = logging.getLogger(__name__)

_TAKEN_UP_S = 3.0
"""A draft that watches the folder takes a mailbox up within this time."""
_IDLE_S = 1.0
"""How long to wait for a moment without a step under way, which would go without its proposals."""
_AGAIN_S = 60.0


class Handover:
    """Who serves a mailbox: the sidecar that holds this, or a draft beside it. For one thread."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._link: Path | None = None
        self._since_s = 0.0
        self._wished_s: float | None = None
        self._not_before_s = 0.0

    @property
    def is_given(self) -> bool:
        """Whether the draft has it."""
        return self._link is not None

    def follow(self, folder: str | None) -> None:
        """Bring about what is wished.

        Args:
            folder: that the draft watches; None takes the mailbox back.
        """
        now = time.monotonic()
        if self._link is not None:
            if self._mailbox.word(SERVING):
                self._since_s = now
            if self._link.parent != Path(folder or "/") or not self._link.is_symlink():
                self.take_back()
            elif now - self._since_s > _TAKEN_UP_S:
                logger.warning("nobody serves '%s': asking the draft over the wire", self._link.parent)
                self._not_before_s = now + _AGAIN_S
                self.take_back()
        elif folder is not None and now >= self._not_before_s and Path(folder).is_dir():
            self._wished_s = now if self._wished_s is None else self._wished_s
            if self._is_idle or now - self._wished_s > _IDLE_S:
                self._give(Path(folder), now)

    def adopt(self, folder: str | None) -> None:
        """Take over what a sidecar before this one has given away, before anything is answered."""
        link = self._link_in(Path(folder)) if folder is not None else None
        if link is not None and link.is_symlink() and link.resolve() == self._mailbox.path.resolve():
            self._link, self._since_s = link, time.monotonic()

    def take_back(self) -> None:
        """Serve it from here."""
        if self._link is not None:
            self._link.unlink(missing_ok=True)
            self._link = None
            self._mailbox.set_word(SERVING, 0)

    def _link_in(self, folder: Path) -> Path:
        return folder / f"{self._mailbox.path.name.removesuffix(SUFFIX)}{SUFFIX}"

    @property
    def _is_idle(self) -> bool:
        return is_reached(self._mailbox.word(REPLY), self._mailbox.word(CONTROL))

    def _give(self, folder: Path, now: float) -> None:
        # Nothing is asked until the draft says that it serves.
        self._mailbox.set_word(SERVING, 0)
        link = self._link_in(folder)
        try:
            link.symlink_to(self._mailbox.path.resolve())
        except OSError as error:
            logger.warning("cannot leave the mailbox in '%s': %s", folder, error)
            self._not_before_s = now + _AGAIN_S
            return
        self._link, self._since_s, self._wished_s = link, now, None
