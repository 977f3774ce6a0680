"""The target replicas as one backend: a request whose replica dies goes on at another."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve_app.backend import BackendUnavailableError, ReplicaReport
from unmask.errors import UserError
from unmask.types import SamplingOptions, TokenDelta

logger = logging.getLogger(__name__)

MAX_RESUMES = 3


class ReplicaBackend:
    """Generates on whichever target replica Serve picks.

    A response whose replica dies is continued elsewhere by replaying the prompt and the tokens already sent; the
    client sees a pause. Greedy text is that of an unbroken run up to the engine's rounding; sampled text follows the
    same distribution.

    Args:
        target: the target deployment.
        directory: the directory deployment.
        on_resume: called for every continuation.
    """

    def __init__(self, target: DeploymentHandle, directory: DeploymentHandle, on_resume: Callable[[], None]) -> None:
        self._target = target.options(stream=True, method_name="generate")
        self._directory = directory
        self._on_resume = on_resume

    async def generate(
        self, request_id: str, prompt_ids: list[int], options: SamplingOptions
    ) -> AsyncGenerator[TokenDelta, None]:
        """See `Backend.generate`."""
        sent: list[int] = []
        for attempt in range(MAX_RESUMES + 1):
            part = self._generate(f"{request_id}-{attempt}", *self._arguments(prompt_ids, options, sent))
            try:
                async with aclosing(part) as deltas:
                    async for delta in deltas:
                        sent += delta.token_ids
                        # A continuation does not know of the forwards before it.
                        yield replace(delta, num_forwards=None) if attempt else delta
                return
            except BackendUnavailableError as error:
                if attempt == MAX_RESUMES or not can_resume(options, len(sent)):
                    raise
                logger.warning("request %s goes on after %d tokens: %s", request_id, len(sent), error)
                self._on_resume()

    async def reports(self) -> Sequence[ReplicaReport]:
        """See `Backend.reports`."""
        try:
            return await self._directory.reports.remote()
        except (RayError, RayServeException) as error:
            raise BackendUnavailableError(type(error).__name__) from None

    def _arguments(self, prompt_ids: list[int], options: SamplingOptions, sent: list[int]) -> tuple[Any, ...]:
        """What a replica is called with for the tokens that are still to come."""
        return prompt_ids + sent, rest_of(options, len(sent))

    async def _generate(self, request_id: str, *arguments: Any) -> AsyncGenerator[TokenDelta, None]:
        """One attempt at one replica."""
        response = cast("DeploymentResponseGenerator[TokenDelta]", self._target.remote(request_id, *arguments))
        finished = False
        try:
            async for delta in response:
                yield delta
            finished = True
        except RayTaskError as error:
            if isinstance(error.cause, UserError | BackendUnavailableError):
                raise error.cause from None
            raise
        except (RayError, RayServeException) as error:
            raise BackendUnavailableError(type(error).__name__) from None
        finally:
            if not finished:
                response.cancel()


class DiffusionReplicas(ReplicaBackend):
    """The replicas of a diffusion LM. What was sent goes along as the response's beginning, so that blocks stay where
    they were; with one seed for all attempts, sampled text too is that of an unbroken run."""

    def generate(
        self, request_id: str, prompt_ids: list[int], options: SamplingOptions
    ) -> AsyncGenerator[TokenDelta, None]:
        """See `Backend.generate`."""
        if options.seed is None:
            options = replace(options, seed=secrets.randbits(63))
        return super().generate(request_id, prompt_ids, options)

    def _arguments(self, prompt_ids: list[int], options: SamplingOptions, sent: list[int]) -> tuple[Any, ...]:
        return prompt_ids, options, tuple(sent)


def can_resume(options: SamplingOptions, num_sent: int) -> bool:
    """Whether a replay of prompt and sent tokens continues the response.

    Not if the engine would have to remember which tokens were the response's: penalties count those alone, and a
    grammar is in a state that they have led to. Nor if only the finish reason was lost.
    """
    if num_sent == 0:
        return True
    stateful = options.presence_penalty or options.frequency_penalty or options.json_schema or options.structural_tag
    return not stateful and num_sent < options.max_tokens


def rest_of(options: SamplingOptions, num_sent: int) -> SamplingOptions:
    """Options for the tokens that are still to come; a seed is moved on, lest the same noise be drawn again."""
    if num_sent == 0:
        return options
    seed = None if options.seed is None else (options.seed + num_sent) % 2**63
    return replace(options, max_tokens=options.max_tokens - num_sent, seed=seed)
