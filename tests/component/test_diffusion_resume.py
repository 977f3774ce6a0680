"""Responses of a diffusion LM whose replicas die on the way."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from ray.exceptions import RayActorError

from serve_app.diffusion_engine import StreamingEngine
from serve_app.replicas import DiffusionReplicas
from tests.component.diffusion_service import DECODERS, LENGTH, library
from unmask.decoding.engine import EngineConfig
from unmask.decoding.request import DecodeRequest
from unmask.types import SamplingOptions, TokenDelta


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, StreamingEngine]]:
    config = EngineConfig(max_rows=4, max_length=LENGTH)
    made = {kind: StreamingEngine(lambda k=kind: library(k), config) for kind in ("bidirectional", "block_causal")}
    yield made
    for engine in made.values():
        engine.stop()


class DyingReplicas:
    """In a deployment handle's place: the engine's deltas, cut off after some of them until `deaths` calls are over."""

    def __init__(self, engine: StreamingEngine, deaths: int) -> None:
        self.engine = engine
        self.deaths = deaths
        self.prefixes: list[int] = []

    def options(self, **_: Any) -> DyingReplicas:
        """The handle itself."""
        return self

    def remote(self, request_id: str, prompt_ids: list[int], options: SamplingOptions, prefix: tuple[int, ...]) -> Any:
        """One call of a replica's `generate`."""
        self.prefixes.append(len(prefix))
        request = DecodeRequest(request_id=request_id, prompt_ids=tuple(prompt_ids), options=options, prefix=prefix)
        return Call(self.engine.generate(request, options.decoder), dies=len(self.prefixes) <= self.deaths)


@dataclass
class Call:
    """The stream of one call."""

    deltas: AsyncGenerator[TokenDelta, None]
    dies: bool

    async def __aiter__(self) -> AsyncIterator[TokenDelta]:
        async for delta in self.deltas:
            yield delta
            if self.dies:
                raise RayActorError

    def cancel(self) -> None:
        """Nothing runs elsewhere."""


@pytest.mark.parametrize("name", ["one_token", "threshold", "dual", "apd", "d2f"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
async def test_a_response_survives_its_replicas(engines: dict[str, StreamingEngine], name: str, temperature: float):
    engine = engines["block_causal" if name == "d2f" else "bidirectional"]
    options = SamplingOptions(
        max_tokens=40, ignore_eos=True, temperature=temperature, seed=4, decoder={**DECODERS[name]}
    )
    texts, resumed = [], 0

    def resume() -> None:
        nonlocal resumed
        resumed += 1

    for deaths in (0, 2):
        handle = DyingReplicas(engine, deaths)
        replicas = DiffusionReplicas(handle, handle, resume)
        texts.append([token async for delta in replicas.generate("r", [70, 71], options) for token in delta.token_ids])
        assert handle.prefixes == sorted(set(handle.prefixes))
        assert len(handle.prefixes) == 1 + deaths
    assert texts[0] == texts[1]
    assert (len(texts[0]), resumed) == (40, 2)
