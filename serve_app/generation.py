"""One request on its way through the backend: admission, deadline, tokens to text, all its choices at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from serve_app import errors
from serve_app.admission import Admission
from serve_app.backend import Backend, BackendUnavailableError
from serve_app.detokenizer import Decode, Detokenizer, StopStrings
from serve_app.replies import FinishReason
from unmask.errors import UserError
from unmask.types import SamplingOptions, TokenDelta

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceSpec:
    """What one choice is generated from."""

    prompt_ids: list[int]
    options: SamplingOptions
    stops: tuple[str, ...] = ()
    decode: Decode | None = None
    """How tokens become text, where it is not the usual way."""


@dataclass(slots=True, kw_only=True)
class Piece:
    """What a choice has grown by; pieces add up to the whole choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_forwards: int | None = None

    def add(self, other: Piece) -> None:
        """Append a later piece of the same choice."""
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.finish_reason = other.finish_reason
        self.num_forwards = other.num_forwards


class Choice:
    """Turns the tokens of one choice into pieces of text, up to a stop string or the backend's own end."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._text = Detokenizer(decode)
        self._stops = StopStrings(stops)

    def push(self, delta: TokenDelta) -> Piece:
        """Take in a delta. Tokens after the one that completed a stop string are dropped."""
        if delta.finish_reason in ("abort", "error"):
            raise BackendUnavailableError(f"the backend ended the request with '{delta.finish_reason}'")
        piece = Piece(num_forwards=delta.num_forwards)
        for position, token_id in enumerate(delta.token_ids):
            piece.token_ids.append(token_id)
            if delta.logprobs is not None:
                piece.logprobs.append(delta.logprobs[position])
            ends_response = delta.finish_reason == "stop" and position == len(delta.token_ids) - 1
            if not ends_response:
                piece.text += self._stops.push(self._text.push(token_id))
            if self._stops.matched:
                piece.finish_reason = "stop"
                return piece
        if delta.finish_reason is not None:
            piece.text += self._stops.push(self._text.finish()) + self._stops.finish()
            piece.finish_reason = "stop" if self._stops.matched else delta.finish_reason
        return piece


class Generation:
    """The pieces of all choices of one request, in the order in which they come: `(choice index, piece)`.

    The work runs in a task of its own, so that a slow reader holds no engine slot and a reader that goes away
    (`aclose`) ends it at once.
    """

    def __init__(
        self,
        request_id: str,
        specs: Sequence[ChoiceSpec],
        *,
        backend: Backend,
        admission: Admission,
        decode: Decode,
        deadline_s: float,
        api_key: str = "",
    ) -> None:
        self.started = time.perf_counter()
        self.admitted: float | None = None
        self.answered = asyncio.Event()
        """Set by whoever answers, when the client has been sent everything."""
        self._request_id = request_id
        self._specs = specs
        self._backend = backend
        self._admission = admission
        self._api_key = api_key
        self._decode = decode
        self._deadline_s = deadline_s
        self._failure: errors.ApiError | None = None
        self._pieces: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(lambda _: self._pieces.put_nowait(None))

    def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        return self

    async def __anext__(self) -> tuple[int, Piece]:
        """The next piece. Raises ApiError when the request failed."""
        item = await self._pieces.get()
        if item is None:
            await self._task
            raise StopAsyncIteration
        return item

    def fail(self, error: errors.ApiError) -> None:
        """End the work, and tell the reader why after what there is."""
        if not self._task.done():
            self._failure = error
            self._task.cancel()

    async def aclose(self) -> None:
        """End the work, if it has not ended, and wait until its slots are free."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._generate()
        except asyncio.CancelledError:
            if self._failure is None:
                raise
            raise self._failure from None
        except TimeoutError:
            raise errors.deadline_exceeded(self._deadline_s) from None
        except ExceptionGroup as group:
            raise self._as_api_error(group) from None

    async def _generate(self) -> None:
        async with self._admission.admit(len(self._specs), self._api_key):
            self.admitted = time.perf_counter()
            async with asyncio.TaskGroup() as choices:
                for index, spec in enumerate(self._specs):
                    choices.create_task(self._generate_choice(index, spec))

    async def _generate_choice(self, index: int, spec: ChoiceSpec) -> None:
        choice = Choice(spec.decode or self._decode, spec.stops)
        source = self._backend.generate(f"{self._request_id}-{index}", spec.prompt_ids, spec.options)
        async with aclosing(source) as deltas:
            async for delta in deltas:
                piece = choice.push(delta)
                self._pieces.put_nowait((index, piece))
                if piece.finish_reason is not None:
                    return
        raise BackendUnavailableError("the backend ended the request without a reason")

    def _as_api_error(self, group: ExceptionGroup) -> errors.ApiError:
        """What the client is told when choices failed: the first failure, as the others follow from it."""
        error = group.exceptions[0]
        if isinstance(error, errors.ApiError):
            return error
        if isinstance(error, UserError):
            return errors.from_user_error(error)
        if isinstance(error, BackendUnavailableError):
            logger.warning("request %s found no backend: %s", self._request_id, error)
            return errors.unavailable("the model is not available at the moment; try again")
        logger.error("request %s failed", self._request_id, exc_info=error)
        return errors.internal()
