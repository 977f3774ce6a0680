"""Cache rows of a decoding loop: who owns which, and what of it is valid."""

from __future__ import annotations

from collections.abc import Iterable

from unmask.decoding.batch import Window
from unmask.denoiser import DecodeState, Denoiser
from unmask.models.cache import KVCache


class Slots:
    """A fixed number of rows of a fixed capacity, one cache for each network that needs one."""

    def __init__(self, models: Iterable[Denoiser], num_rows: int, capacity: int) -> None:
        self.num_rows = num_rows
        self.capacity = capacity
        self.caches: dict[Denoiser, KVCache] = {}
        self._free = list(range(num_rows))[::-1]
        self.add_models(models)

    @property
    def num_free(self) -> int:
        """Rows that nobody owns."""
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        """Device memory of all caches."""
        return sum(cache.num_bytes for cache in self.caches.values())

    def add_models(self, models: Iterable[Denoiser]) -> None:
        """Allocate a cache for every network that has none yet."""
        for model in models:
            if model not in self.caches:
                self.caches[model] = model.new_cache(self.num_rows, self.capacity)

    def acquire(self) -> int:
        """Take a free row."""
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Give a row back, its cached columns forgotten."""
        for cache in self.caches.values():
            cache.crop(slot, 0)
        self._free.append(slot)

    def announce(self, state: DecodeState, window: Window, models: Iterable[Denoiser]) -> None:
        """Note that a window is about to be written. Raises ValueError where it would leave a gap."""
        for model in models:
            self.caches[model].extend(state.slot, window.start, window.stop)

    def settle(self, state: DecodeState) -> None:
        """Forget the columns of a row that its decoder no longer vouches for."""
        for cache in self.caches.values():
            cache.crop(state.slot, state.cached)
