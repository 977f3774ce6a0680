"""A load that is kept up, as a service has it: a request that ends is followed by the next one."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.pairing_shapes import SHAPES

PROMPT_TOKENS = 64
SETTLED_STEPS = 1000
"""After so many steps of a kept-up load the engine has chosen its K: it does so every 128."""

Steps = list[tuple[float, int]]
"""When each step ended, by the wall clock, and the tokens that it emitted."""


@dataclass(slots=True)
class Load:
    """What a kept-up load has shown so far."""

    steps: Steps = field(default_factory=list)
    requests: int = 0
    failed: int = 0
    """Requests that ended with another number of tokens than they were to have."""


def keep_up(
    llm: Any, shape: str, concurrency: int, lengths: tuple[int, int], is_enough: Callable[[Load], bool]
) -> Load:
    """Run `concurrency` requests at any time until `is_enough` says so after a step; what still runs is aborted.

    Args:
        shape: whose vocabulary the random prompts are of.
        lengths: the shortest and the longest response, in tokens.
    """
    engine, generator, load = llm.llm_engine, random.Random(0), Load()
    shortest, longest = lengths
    left: dict[str, int] = {}

    def begin(length: int) -> None:
        prompt = [generator.randrange(1000, SHAPES[shape].vocab_size - 1000) for _ in range(PROMPT_TOKENS)]
        name = f"kept-up-{load.requests}"
        engine.add_request(name, {"prompt_token_ids": prompt}, delta_params(length))
        left[name] = length
        load.requests += 1

    for _ in range(concurrency):
        # Of all ages at once, lest all end together.
        begin(generator.randint(shortest // 4, longest))
    while not is_enough(load):
        emitted = 0
        for output in engine.step():
            emitted += len(output.outputs[0].token_ids)
            left[output.request_id] -= len(output.outputs[0].token_ids)
            if output.finished:
                load.failed += left.pop(output.request_id) != 0
                begin(generator.randint(shortest, longest))
        load.steps.append((time.time(), emitted))
    engine.abort_request(list(left))
    while engine.has_unfinished_requests():
        engine.step()
    return load


def delta_params(length: int) -> Any:
    """Greedy, of exactly `length` tokens; an output tells the tokens since the one before."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )


def pauses_ms(steps: Steps) -> list[tuple[float, float]]:
    """When each step but the first began, and the milliseconds that it took."""
    return [(a, 1000 * (b - a)) for (a, _), (b, _) in itertools.pairwise(steps)]
