"""Pages of a bounded pool: counted by their users, kept after them under the hash of what they hold.

A page that nobody uses any more but that is registered under a hash stays findable until room is needed; the least
recently used goes first.
"""

from __future__ import annotations

from collections import OrderedDict

PageKey = tuple[int, int]
"""(session, hash of all tokens up to the page's end)"""


class PagePool:
    """Book-keeping of `num_pages` pages; it knows nothing of their content."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._uses = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, PageKey] = {}
        self._page_of: dict[PageKey, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Registered pages without a user."""
        return len(self._idle)

    @property
    def sessions(self) -> set[int]:
        """Sessions with registered pages."""
        return {session for session, _ in self._page_of}

    def take(self) -> int:
        """A page for one user, its content undefined. One must be available."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._unregister(page)
        self._uses[page] = 1
        return page

    def release(self, page: int) -> None:
        """One user less."""
        self._uses[page] -= 1
        if not self._uses[page]:
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def register(self, page: int, key: PageKey) -> None:
        """Make a page in use findable. A page keeps its first key, a key its first page."""
        if page not in self._key_of and key not in self._page_of:
            self._key_of[page], self._page_of[key] = key, page

    def share(self, key: PageKey) -> int | None:
        """The page registered under a key, with one user more; None if there is none."""
        page = self._page_of.get(key)
        if page is not None:
            self._idle.pop(page, None)
            self._uses[page] += 1
        return page

    def is_fixed(self, page: int) -> bool:
        """Whether others rely on the page's content: it must be copied before it is changed."""
        return self._uses[page] > 1 or page in self._key_of

    def drop_session(self, session: int) -> None:
        """Make the pages of a session unfindable."""
        for page in [page for page, key in self._key_of.items() if key[0] == session]:
            self._unregister(page)
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def _unregister(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
