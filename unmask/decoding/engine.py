"""Continuous batching for every diffusion decoder: rows come and go at any step, each as if it were alone.

`generate` is the plain loop that says what the engine must answer. The engine adds arrivals, decoders side by side,
bounded memory, static shapes and one device synchronisation a step. While a device computes the next step, the host
tells what the last one brought.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch

from unmask.decoding.decoder import Decoder, require
from unmask.decoding.graphs import StepGraphs
from unmask.decoding.grouping import Limits, forward_overhead, group
from unmask.decoding.request import Completion, DecodeRequest, until_stop
from unmask.decoding.slots import Slots
from unmask.decoding.work import Work, assemble, conclude
from unmask.denoiser import DecodeState, Denoiser
from unmask.errors import ConfigError
from unmask.types import TokenDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Bounds of one engine. All device memory beyond weights and activations is allocated at the start."""

    max_rows: int = 32
    """Rows that are decoded together."""
    max_length: int = 1024
    """Longest prompt + response, in tokens."""
    max_waiting: int = 1024
    """Requests that may wait for a row."""
    max_fed_columns: int = 16384
    """Bounds the activations of one forward."""
    max_logits_mb: int = 1024
    """Bounds the float32 logits of one forward; choosing tokens takes a few tensors of that size."""
    forward_columns: int | None = None
    """What a forward costs beside its columns, in columns: wide and narrow rows share one where padding costs less.
    None estimates it (see `forward_overhead`)."""
    shape_multiple: int = 16
    """Columns and keys of a forward come in multiples of this."""
    cuda_graphs: bool = False
    max_graphs: int = 128
    overlap: bool | None = None
    """Start the next forwards before telling what the last ones brought; None does so on anything but a CPU, which
    would make the caller wait for them."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_length", "max_fed_columns", "max_logits_mb", "shape_multiple", "max_graphs"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        widest = f"must be at least max_length = {self.max_length}, which one row may feed"
        require(self.max_fed_columns >= self.max_length, "max_fed_columns", widest)


class EngineFull(RuntimeError):
    """No room to wait; try again later."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a step brought for one request: tokens that will never be revised, and at the end the whole account."""

    request_id: str
    delta: TokenDelta
    completion: Completion | None


@dataclass(slots=True, eq=False)
class _Row:
    decoder: Decoder
    state: DecodeState
    sent: int


@dataclass(frozen=True, slots=True)
class _Flight:
    """Forwards that have been started and not waited for."""

    rows: list[_Row]
    groups: list[list[Work]]
    results: list[torch.Tensor]
    """Tokens [B, K] of each group."""


class DiffusionEngine:
    """Decodes requests over one or more networks. Not thread-safe: one thread submits, aborts and steps."""

    def __init__(self, models: Sequence[Denoiser], config: EngineConfig) -> None:
        """Allocate the caches of `models`, the networks that decoders with a cache may use."""
        self.config = config
        self.slots = Slots(models, config.max_rows, config.max_length)
        self.num_steps = 0
        self.num_batches = 0
        self._limits = Limits(
            capacity=config.max_length,
            fed_columns=config.max_fed_columns,
            logits_bytes=config.max_logits_mb << 20,
            multiple=config.shape_multiple,
            rows_power_of_two=config.cuda_graphs,
        )
        self._graphs = StepGraphs(self.slots.caches, config.max_graphs) if config.cuda_graphs else None
        self._overheads: WeakKeyDictionary[Denoiser, int] = WeakKeyDictionary()
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._flight: _Flight | None = None

    @property
    def num_running(self) -> int:
        """Rows being decoded."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether another step would do anything."""
        return bool(self._running or self._waiting)

    def submit(self, request: DecodeRequest, decoder: Decoder) -> None:
        """Queue a request.

        Raises:
            PromptError, ConfigError: a request or decoder that this engine cannot run.
            EngineFull: too many requests wait already.
        """
        state = decoder.admit(request, slot=-1)
        self._check(request, decoder)
        if len(self._waiting) >= self.config.max_waiting:
            raise EngineFull(f"{len(self._waiting)} requests wait already")
        self._waiting.append(_Row(decoder, state, sent=state.prompt_len + len(request.prefix)))

    def abort(self, request_id: str) -> bool:
        """Drop a request, waiting or running. Returns whether there was one."""
        for row in self._running:
            if row.state.request_id == request_id:
                row.state.finish_reason = "abort"
                self._retire(row)
                return True
        for row in self._waiting:
            if row.state.request_id == request_id:
                self._waiting.remove(row)
                return True
        return False

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Bring one forward of every row to its end, and say what came of it; waiting requests join the next one."""
        if self._flight is None:
            self._take_off()
        landed = self._land()
        if landed and self._overlaps(landed[0]):
            self._take_off()
        reports = [self._report(row) for row in landed]
        return [report for report in reports if report is not None]

    def run(self, requests: Iterable[DecodeRequest], decoder: Decoder) -> Iterator[Completion]:
        """Decode requests as rows become free, yielding completions in the order in which they finish.

        Raises:
            PromptError, ConfigError: at the first request that cannot be decoded.
        """
        source = iter(requests)
        while True:
            room = self.config.max_rows - self.num_running - self.num_waiting
            for request in itertools.islice(source, max(room, 0)):
                self.submit(request, decoder)
            if not self.has_work:
                return
            yield from (output.completion for output in self.step() if output.completion is not None)

    def _check(self, request: DecodeRequest, decoder: Decoder) -> None:
        if request.length > self.config.max_length:
            raise ConfigError(
                f"{request.length} columns exceed the engine's {self.config.max_length}", field="max_tokens"
            )
        for model in decoder.cached_models:
            if model not in self.slots.caches:
                raise ConfigError("the decoder's network has no cache in this engine", field="decoder")
        logits_bytes = decoder.max_open * decoder.denoiser.vocab_size * 4
        if logits_bytes > self._limits.logits_bytes:
            needed = f"{decoder.max_open} open columns need {-(-logits_bytes // (1 << 20))} MB of logits"
            raise ConfigError(f"{needed}; raise max_logits_mb or open fewer", field="decoder")

    def _admit(self) -> None:
        while self._waiting and self.slots.num_free:
            row = self._waiting.popleft()
            row.state.slot = self.slots.acquire()
            self._running.append(row)

    def _retire(self, row: _Row) -> None:
        self._running.remove(row)
        self.slots.release(row.state.slot)

    def _overhead(self, decoder: Decoder) -> int:
        if self.config.forward_columns is not None:
            return self.config.forward_columns
        if decoder.denoiser not in self._overheads:
            self._overheads[decoder.denoiser] = forward_overhead(decoder.denoiser)
        return self._overheads[decoder.denoiser]

    def _overlaps(self, row: _Row) -> bool:
        if self.config.overlap is None:
            return row.decoder.denoiser.device.type != "cpu"
        return self.config.overlap

    def _take_off(self) -> None:
        """Admit what fits and start one forward of every row."""
        self._admit()
        if self._running:
            groups = group([Work.of(row.decoder, row.state) for row in self._running], self._limits, self._overhead)
            self._flight = _Flight(list(self._running), groups, [self._launch(members) for members in groups])

    def _land(self) -> list[_Row]:
        """Wait for the forwards under way and move their rows on; those that have finished give their slots back."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        for members, tokens_BK in zip(flight.groups, _read_back(flight.results), strict=True):
            conclude(members, tokens_BK, self.slots)
        self.num_steps += 1
        self.num_batches += len(flight.groups)
        landed = [row for row in flight.rows if row.state.finish_reason != "abort"]
        for row in landed:
            if row.state.finish_reason is not None:
                self._retire(row)
        return landed

    def _launch(self, members: Sequence[Work]) -> torch.Tensor:
        """Start one forward; nothing waits for the device here."""
        decoder = members[0].decoder
        batch = assemble(members, self._limits.shape_of(members), self.slots)
        if self._graphs is not None:
            return self._graphs.run(decoder, batch)
        return decoder.step(batch.unpack(), self.slots.caches)

    def _report(self, row: _Row) -> Output | None:
        state = row.state
        fresh = state.tokens[row.sent : max(row.sent, state.committed)]
        if state.saw_stop:
            fresh = until_stop(fresh, state.stop_ids)
        finished = state.finish_reason is not None
        if not len(fresh) and not finished:
            return None
        row.sent = max(row.sent, state.committed)
        num_forwards = state.num_forwards if finished else None
        delta = TokenDelta(token_ids=fresh.tolist(), finish_reason=state.finish_reason, num_forwards=num_forwards)
        return Output(state.request_id, delta, Completion.of(state) if finished else None)


def _read_back(pending: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Bring the tokens [B, K] of all forwards to the host: the one synchronisation of a step."""
    if not pending:
        return []
    flat = torch.cat([tokens_BK.flatten() for tokens_BK in pending]).cpu().numpy()
    ends = np.cumsum([tokens_BK.numel() for tokens_BK in pending])[:-1]
    parts = np.split(flat, ends)
    return [part.reshape(tokens_BK.shape) for part, tokens_BK in zip(parts, pending, strict=True)]
