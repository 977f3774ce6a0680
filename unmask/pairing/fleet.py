"""Several drafts for one target worker: its requests are spread over them, and move on when one is gone.

A request keeps its draft, which holds its context. One that shares a prefix goes where the prefix is, any other where
the fewest requests are. When a draft is gone its requests move at once; what the new one has not seen is a gap.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.pairing.announcement import Announcement
from unmask.pairing.client import DraftLink
from unmask.pairing.hello import Hello, TargetShape
from unmask.pairing.link_file import read_link_file
from unmask.pairing.mailbox import Control
from unmask.pairing.status import GAUGES, LinkStatus
from unmask.types import ProposalRow

_POLL_S = 0.25
_KNOWN_PREFIXES = 4096


class DraftFleet:
    """The links to all drafts that a link file names; used like a `DraftLink`.

    Args:
        path: the link file.
        shape: what this target is.
        num_speculative_tokens: K that the engine was built for.
        device: where feature rows are projected.
        status: counters to keep, summed over the links.
    """

    def __init__(
        self,
        path: str | Path,
        shape: TargetShape,
        num_speculative_tokens: int,
        device: torch.device | str = "cpu",
        status: LinkStatus | None = None,
    ) -> None:
        self.status = status or LinkStatus()
        self.links: list[DraftLink] = []
        self._num_named = 0
        self._path = path
        self._new_link = lambda index: DraftLink(path, shape, num_speculative_tokens, device, index=index)
        self._epochs = 0.0
        self._home: dict[int, int] = {}
        self._left: dict[int, list[int]] = {}
        """By draft, requests that have moved on and that it may hold yet."""
        self._prefixes: OrderedDict[int, int] = OrderedDict()
        self._pool = ThreadPoolExecutor(thread_name_prefix="draft_fleet")
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="draft_fleet", daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def close(self) -> None:
        """Hang up for good."""
        self._closing.set()
        self._thread.join()
        for link in self.links:
            link.close()
        self._pool.shutdown()

    @property
    def num_speculative_tokens(self) -> int:
        """The largest K of any draft; 0 while there is none to ask."""
        return max((link.num_speculative_tokens for link in self.links), default=0)

    @property
    def hello(self) -> Hello | None:
        """The first draft that can be asked; None if there is none."""
        ready = (link.hello for link in self.links if link.num_speculative_tokens)
        return next((hello for hello in ready if hello), None)

    @property
    def mailbox_folder(self) -> str | None:
        """See `DraftLink.mailbox_folder`. With several drafts there is none that could serve all requests."""
        return self.links[0].mailbox_folder if self._is_single else None

    @property
    def _is_single(self) -> bool:
        """Whether there is one draft to ask; there may be links that rest."""
        return self._num_named <= 1 and bool(self.links)

    def begin_epoch(self, before: float = 0.0) -> None:
        """What drafts have seen so far is lost without a new greeting; `before` counts epochs of a time before this."""
        self._epochs += 1 + before
        self._sum_up()

    def leave(self) -> None:
        """Somebody else drafts from now on: what the drafts hold of the requests under way is of no use any more. For
        the thread that asks."""
        homes, self._home = self._home, {}
        left: dict[int, list[int]] = {}
        for request, home in homes.items():
            left.setdefault(home, []).append(request)
        for home, requests in left.items():
            self.links[home].end(requests)

    def hang_up(self) -> None:
        """End the epochs of all links (see `DraftLink.hang_up`)."""
        for link in self.links:
            link.hang_up()

    @property
    def adaptive_k(self) -> bool:
        """Whether the link file leaves K to a controller."""
        return any(link.adaptive_k for link in self.links)

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Wait until every draft of the link file can be asked; False if the time is up first."""
        end = threading.Event()
        timer = threading.Timer(timeout_s, end.set)
        timer.start()
        while not (ready := self._all_ready()) and not end.wait(0.01):
            continue
        timer.cancel()
        return ready

    def propose(
        self,
        rows: Sequence[ProposalRow],
        features: Tensor,
        finished: Sequence[int] = (),
        k: int | None = None,
        version: int | None = None,
        min_chance: float = 0.0,
    ) -> list[list[int]]:
        """Proposals for one step (see `DraftLink.propose`), all drafts at work at the same time."""
        ended: dict[int, list[int]] = {}
        for request in finished:
            ended.setdefault(self._home.pop(request, 0), []).append(request)
        homes = self._assign(rows, version)
        self._tell_left(homes, ended)
        shares = {home: [i for i, h in enumerate(homes) if h == home] for home in {*homes, *ended}}
        ends = np.cumsum([row.num_features for row in rows], dtype=np.int64)

        def ask(home: int) -> list[list[int]]:
            mine = [rows[i] for i in shares[home]]
            own = features
            if len(mine) < len(rows):
                picked = [np.arange(ends[i] - rows[i].num_features, ends[i]) for i in shares[home]]
                index = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *picked]))
                # As bytes, since not every operation knows every element type.
                rows_of_bytes = features.contiguous().view(torch.uint8)
                own = rows_of_bytes.index_select(0, index.to(features.device)).view(features.dtype)
            return self.links[home].propose(mine, own, ended.get(home, ()), k, version, min_chance)

        proposals: list[list[int]] = [[] for _ in rows]
        asked = sorted(home for home in shares if home < len(self.links))
        answers = map(ask, asked) if len(asked) == 1 else self._pool.map(ask, asked)
        for home, answer in zip(asked, answers, strict=True):
            for i, ids in zip(shares[home], answer, strict=True):
                proposals[i] = ids
        self._sum_up()
        return proposals

    def ask(
        self, rows: np.ndarray, hashes: np.ndarray, context: Tensor, finished: Sequence[int], k: int, version: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same for `ROW` records and the hashes of their pages, whose features have been projected.

        Returns:
            int32 ids [R, k], and how many of each row are valid [R].
        """
        tokens, counts = np.zeros((len(rows), k), dtype=np.int32), np.zeros(len(rows), dtype=np.uint8)
        if self._is_single:
            # Nothing to choose from, and no objects to make.
            self._settle(rows["request"], finished)
            proposals = self.links[0].ask(rows, hashes, context, finished, k, version)
            if proposals is not None:
                tokens[:, : proposals.tokens.shape[1]], counts = proposals.tokens, proposals.counts
            return tokens, counts
        ends = np.cumsum(rows["num_hashes"], dtype=np.int64)
        of_row = np.split(hashes, ends[:-1]) if len(rows) else []
        named = [
            ProposalRow(
                request=request, start=start, num_features=count, last_token=last, page_hashes=tuple(own.tolist())
            )
            for (request, start, count, last, _), own in zip(rows.tolist(), of_row, strict=True)
        ]
        for i, ids in enumerate(self.propose(named, context, finished, k, version)):
            tokens[i, : len(ids)], counts[i] = ids, len(ids)
        return tokens, counts

    def announce(self, announcement: Announcement) -> int:
        """See `DraftLink.announce`. With several drafts nobody knows yet which of them will be asked for whom."""
        if not self._is_single or not (k := self.links[0].announce(announcement)):
            return 0
        self._settle(announcement.requests, announcement.finished)
        return k

    def ask_announced(
        self, control: Control, k: int, parts: Sequence[memoryview], deliver: Callable[[memoryview], None]
    ) -> bool:
        """See `DraftLink.ask_announced`."""
        return self.links[0].ask_announced(control, k, parts, deliver)

    def _settle(self, requests: np.ndarray, finished: np.ndarray | Sequence[int]) -> None:
        """The only draft is everybody's home."""
        for request in finished:
            self._home.pop(int(request), None)
        self._home.update(dict.fromkeys(requests.tolist(), 0))

    def _assign(self, rows: Sequence[ProposalRow], version: int | None) -> list[int]:
        """The draft of each row, by index."""
        able = [i for i, link in enumerate(self.links) if link.num_speculative_tokens]
        ready = [i for i in able if version in (None, _version(self.links[i]))] or able or [0]
        load = Counter(self._home.values())
        for row in rows:
            home = self._home.get(row.request)
            if home not in ready:
                if home is not None:
                    self._left.setdefault(home, []).append(row.request)
                home = self._choose(row, ready, load)
                load[home] += 1
            self._home[row.request] = home
            if row.page_hashes and (row.start == 0 or row.page_hashes[0] in self._prefixes):
                self._prefixes[row.page_hashes[0]] = home
                self._prefixes.move_to_end(row.page_hashes[0])
        while len(self._prefixes) > _KNOWN_PREFIXES:
            self._prefixes.popitem(last=False)
        return [self._home[row.request] for row in rows]

    def _tell_left(self, homes: Sequence[int], ended: dict[int, list[int]]) -> None:
        """Let drafts forget the requests that have moved on: with the step that they are asked, or by itself. One that
        is gone has forgotten them already."""
        left, self._left = self._left, {}
        for home, requests in left.items():
            # One that comes back with this step is dropped before its rows are taken in; they leave a gap either way.
            if home in homes:
                ended.setdefault(home, []).extend(requests)
            else:
                self.links[home].end(requests)

    def _choose(self, row: ProposalRow, ready: list[int], load: Counter[int]) -> int:
        """Where a request's cached prefix is, else where the fewest requests are."""
        holder = self._prefixes.get(row.page_hashes[0]) if row.page_hashes and row.start else None
        return holder if holder in ready else min(ready, key=lambda i: (load[i], i))

    def _follow(self) -> None:
        """Open a link for every draft of the link file. Links beyond its end rest until it names as many again."""
        while not self._closing.is_set():
            self._num_named = self._num_drafts()
            while len(self.links) < max(self._num_named, 1):
                link = self._new_link(len(self.links))
                link.start()
                self.links.append(link)
            self._sum_up()
            self._closing.wait(_POLL_S)

    def _num_drafts(self) -> int:
        try:
            return len(read_link_file(self._path).addresses)
        except UserError:
            # The links themselves report what is wrong with the file.
            return 0

    def _all_ready(self) -> bool:
        asked = max(self._num_drafts(), 1)
        return len(self.links) >= asked and all(link.num_speculative_tokens for link in self.links[:asked])

    def _sum_up(self) -> None:
        each = [link.status.as_dict() for link in self.links]
        if not each:
            return
        for name in each[0]:
            values = [status[name] for status in each]
            # Stored once: another process reads them at any time.
            more = self._epochs if name == "epoch" else 0.0
            self.status[name] = max(values) if name in GAUGES else sum(values, more)
        self.status["drafts_connected"] = sum(status["connected"] for status in each)


def _version(link: DraftLink) -> int | None:
    """Of the draft that a link is connected to."""
    hello = link.hello
    return hello.draft_version if hello else None
